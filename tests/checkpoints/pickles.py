"""Pickles written by hand, in the two formats of ``torch.save``."""

import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch


def legacy_parts(data: bytes) -> list[bytes]:
    """The pickles of a file of before torch 1.6: a preamble, ``data``, the storages."""
    preamble = (torch.serialization.MAGIC_NUMBER, 1001, {'little_endian': True})
    return [*(pickle.dumps(part, 2) for part in preamble), data, pickle.dumps([], 2)]


def write_pickle(path: Path, data: bytes, legacy: bool) -> Path:
    """A file whose pickle ``torch.load`` would unpickle.

    Args:
        path: The file.
        data: The pickle.
        legacy: Whether in the format of before torch 1.6, without a zip archive.
    """
    if legacy:
        path.write_bytes(b''.join(legacy_parts(data)))
        return path
    torch.save({}, path)
    return replace_pickle(path, data)


def replace_pickle(path: Path, data: bytes) -> Path:
    """Put another pickle into a checkpoint."""
    whole = io.BytesIO(path.read_bytes())
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, 'w') as target:
        for name in source.namelist():
            is_pickle = name.endswith('/data.pkl')
            target.writestr(name, data if is_pickle else source.read(name))
    return path


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> tuple:
        return self.reduced


def opcodes(*parts: Any) -> bytes:
    """A pickle of opcodes, which are bytes, and of values, which are pushed."""
    pushed = [
        part if isinstance(part, bytes) else pickle.dumps(part, 2)[2:-1] for part in parts
    ]
    return pickle.PROTO + struct.pack('<B', 2) + b''.join(pushed) + pickle.STOP


def name(module: str, attribute: str) -> bytes:
    """The opcode that pushes what a module has under a name."""
    return pickle.GLOBAL + f'{module}\n{attribute}\n'.encode()
