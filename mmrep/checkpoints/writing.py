"""Write checkpoints: the same bytes for the same contents."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from mmrep.errors import UserError, reason

from .atomic import atomic_write


def write_checkpoint(
    path: str | Path, state_dict: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> None:
    """Write ``dict(state_dict=..., meta=...)``, readable with ``weights_only=True``.

    If the path ends in ``.safetensors``, the file has that format; see
    :func:`save_checkpoint` for what it does to ``meta``.

    Args:
        path: The file; replaced whole or not at all.
        state_dict: The weights; written as plain tensors.
        meta: Information about them; written in the types of :func:`plain`.
    """
    with atomic_write(path) as temporary:
        save_checkpoint(temporary, Path(path).suffix, state_dict, meta)


def save_checkpoint(
    path: Path, suffix: str, state_dict: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> None:
    """Write a checkpoint to a file of any name, in the format that ``suffix`` names.

    In ``.safetensors``, ``meta`` is an entry of the file's metadata, in JSON: tuples are
    read back as lists and keys as strings. Tensors that share memory are written as copies.

    Raises:
        UserError: If the format cannot hold the weights.
    """
    tensors = {key: value.detach() for key, value in state_dict.items()}
    if suffix == '.safetensors':
        try:
            parts = _safetensors(tensors, plain(meta))
        except Exception as error:
            # The library raises errors of many types.
            raise UserError(
                f'a .safetensors file cannot hold this checkpoint ({reason(error)}): give '
                'a name that ends in .pth'
            ) from error
        with open(path, 'wb') as file:
            file.writelines(parts)
        return
    content = dict(
        state_dict={key: _compact(value) for key, value in tensors.items()},
        meta=plain(meta),
    )
    # Given a path, torch would write its name into the file, too.
    with open(path, 'wb') as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            # After a failed write, torch's own writer raises an error about the position.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def _compact(tensor: Tensor) -> Tensor:
    """The tensor without the rest of a larger storage, which ``torch.save`` would write."""
    if tensor.layout != torch.strided or tensor.nbytes == tensor.untyped_storage().nbytes():
        return tensor
    return tensor.clone()


def _safetensors(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> list[bytes]:
    """The contents of a ``.safetensors`` file, in parts."""
    storages, apart = set(), {}
    for key, tensor in tensors.items():
        # The format has neither strides nor shared memory.
        shared = tensor.untyped_storage().data_ptr() in storages
        storages.add(tensor.untyped_storage().data_ptr())
        apart[key] = tensor.clone() if shared else tensor
        apart[key] = apart[key].contiguous()
    metadata = dict(format='pt', meta=json.dumps(meta, default=_for_json))
    content = safetensors.torch.save(apart, metadata)
    # The library writes the entries of the metadata in a random order.
    start = 8 + int.from_bytes(content[:8], 'little')
    header = json.loads(content[8:start]) | dict(__metadata__=metadata)
    text = json.dumps(header, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)
    return [len(text).to_bytes(8, 'little'), text, memoryview(content)[start:]]


def _for_json(value: Any) -> Any:
    """Convert a value of a type that JSON does not have."""
    return value.tolist() if isinstance(value, Tensor) else str(value)


def plain(value: Any) -> Any:
    """Convert a value to Python's own types: no numpy, no configs, no objects.

    Tensors stay. Sets become sorted lists, and frozensets sorted tuples. A value without an
    equivalent in these types becomes its ``str``.
    """
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(plain(item) for item in value)
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, set | frozenset):
        # Their iteration order differs between processes.
        items = sorted(map(plain, value), key=repr)
        # A frozenset may be a key, as a tuple may.
        return items if isinstance(value, set) else tuple(items)
    if isinstance(value, np.ndarray | np.generic):
        item = value.tolist()
        # A long double stays a scalar of numpy.
        return str(item) if isinstance(item, np.generic) else plain(item)
    if value is None or isinstance(value, Tensor):
        return value
    if isinstance(value, str):
        # File names may hold bytes that are not Unicode.
        return value.encode('utf-8', 'backslashreplace').decode()
    for kind in (bool, int, float, bytes):
        if isinstance(value, kind):
            # Converts instances of subclasses, too, such as members of enums.
            return kind(value)
    return str(value)


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
