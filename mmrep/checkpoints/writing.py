"""Write files whole or not at all."""

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmrep.errors import UserError


def refuse_existing(*paths: str | Path, overwrite: bool = False) -> None:
    """Raise a ``UserError`` if a path is a folder, or a file that must be kept."""
    for path in map(Path, paths):
        if path.is_dir():
            raise UserError(f'{path} is a folder: give the name of a file')
        if path.exists() and not overwrite:
            raise UserError(f'{path} exists: give another name, or --overwrite')


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A temporary file that becomes ``path`` if the block ends well, and else goes.

    The folder of ``path`` is made. The contents are on the disk before they take the name,
    so that a machine that stops leaves the old file or the new one, whole.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(
        prefix=f'.{path.stem}-', suffix=path.suffix, dir=path.parent
    )
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        # A temporary file is its owner's alone; the result is like any other file.
        temporary.chmod(0o666 & ~umask)
        _sync(temporary, os.O_RDWR)
        temporary.replace(path)
        if hasattr(os, 'O_DIRECTORY'):
            # The name is the folder's contents. Windows opens no folder.
            _sync(path.parent, os.O_RDONLY)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_checkpoint(
    path: str | Path, state_dict: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> None:
    """Write ``dict(state_dict=..., meta=...)``, readable with ``weights_only=True``.

    Args:
        path: The file; replaced whole or not at all.
        state_dict: The weights; written as plain tensors.
        meta: What is said of them; see :func:`plain`.
    """
    tensors = {key: value.detach() for key, value in state_dict.items()}
    with atomic_write(path) as temporary:
        torch.save(dict(state_dict=tensors, meta=plain(meta)), temporary)


def plain(value: Any) -> Any:
    """``value`` in Python's own types: no numpy, no configs, no objects.

    Tensors stay, and what has no such form becomes its ``str``.
    """
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(plain(item) for item in value)
    if isinstance(value, list | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        item = value.tolist()
        # A long double has no other form.
        return str(item) if isinstance(item, np.generic) else plain(item)
    if value is None or isinstance(value, Tensor):
        return value
    for kind in (bool, int, float, str, bytes):
        if isinstance(value, kind):
            # Of a subclass, too, as an enumeration's members are.
            return kind(value)
    return str(value)


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
