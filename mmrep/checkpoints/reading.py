"""Read checkpoints without running code from them.

A checkpoint is a zip archive with a pickle and the bytes of tensors, or a safetensors
file. :func:`read_checkpoint` verifies the archive (``archive.py``), unpickles with lists of
what may be named, called and changed (``unpickling.py``), and checks the number, depth and
types of the values (``contents.py``). It works the same on every torch version, whatever
the default of ``weights_only``.

``torch.load(weights_only=True)`` is not enough. It refuses mmengine's checkpoints unless
``builtins.getattr``, ``HistoryBuffer`` and numpy's constructors are made safe globals, and
torch before 2.4 has no list of safe globals. With the real ``getattr`` on that list, a file
can run code (tried with torch 2.12): the pickle uses ``getattr`` to get ``eval`` and the
globals of torch's own rebuild functions, stores ``eval`` in these globals, and a permitted
call runs it. Later versions accept a substitute for ``getattr``; earlier ones would still
need this reader. ``torch.load`` does not compare the checksums of the archive, either.
"""

import io
import json
import logging
import mmap as memory_map
import os
import stat
import sys
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.runner import CheckpointLoader
from safetensors import safe_open
from torch import Tensor, UntypedStorage
from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION, _get_restore_location

from mmrep.errors import CheckpointError, reason

from .archive import SIGNATURE, Archive
from .contents import Storage, check_contents, packed
from .refusals import Refusal, damaged, excessive
from .unpickling import Unpickler

#: Alignment in bytes that a mapped tensor must have: the width of a vector load.
_ALIGNMENT = 16

#: Limits for safetensors: ten times the tensors of the largest vision models, and the sizes
#: of the table and the ``meta`` that go with them.
_MOST_TENSORS, _LARGEST_TABLE, _LONGEST_META = 20_000, 1 << 23, 1 << 22

#: ``restore(storage, location)``: the storage, on the device that ``map_location`` says.
Restore = Callable[[UntypedStorage, str], UntypedStorage]


def read_checkpoint(path: str | Path, map_location: Any = 'cpu', mmap: bool = True) -> Any:
    """Read a file that ``torch.save`` or safetensors wrote, without running its code.

    The checksum of every entry of the file is compared, which takes about as long as
    reading it from memory. Files in the format before torch 1.6 and safetensors files have
    no checksums, nor have those that torch wrote after ``set_crc32_options(False)``. All
    their sizes are checked, but a changed weight is not detected.

    A safetensors file becomes ``dict(state_dict=..., meta=...)``, where ``meta`` is the
    JSON of the entry ``meta`` in its metadata, or an empty dict if there is none.

    Args:
        path: The file.
        map_location: As ``torch.load``'s. Default: ``'cpu'``.
        mmap: Whether tensors are mapped into memory after they were verified, and take
            memory only when they are used. The file must not be changed as long as they
            are in use. Default: True.

    Raises:
        CheckpointError: If the file is missing, cut short, changed or not a checkpoint, or
            holds an object of a type that is not permitted, or more objects than its
            size can justify.
    """
    restore = _get_restore_location(map_location)
    with _open(path) as file:
        try:
            contents, held = _read(file, restore, mmap)
            check_contents(contents, held)
            return contents
        except Refusal as refusal:
            raise CheckpointError(f'{path} {refusal}') from None
        except MemoryError:
            raise CheckpointError(
                f'{path} needs more memory to read than there is: use a larger machine'
            ) from None
        except Exception as error:
            # torch and pickle raise a dozen types for a damaged file.
            raise CheckpointError(f'{path} {damaged(reason(error))}') from error


def _open(path: str | Path) -> FileIO:
    """Open a regular file; refuse pipes and devices, which could block or never end."""
    if '://' in str(path):
        raise CheckpointError(f'checkpoint {path} is an address: download it first')
    path = os.path.expanduser(path)
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise CheckpointError(f'checkpoint {path} is a folder: give a file in it')
        if not stat.S_ISREG(mode):
            raise CheckpointError(
                f'checkpoint {path} is a pipe, socket or device: copy it into a file first'
            )
        return open(path, 'rb', buffering=0)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f'checkpoint {path} does not exist: check the path') from None
    except PermissionError:
        raise CheckpointError(
            f'checkpoint {path} may not be read: ask for the permission, or copy it as '
            'its owner'
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f'checkpoint {str(path)[:200]!r} cannot be opened ({reason(error)}): check the '
            'path'
        ) from None


def _read(file: FileIO, restore: Restore, mmap: bool) -> tuple[Any, int]:
    """Read the contents of a file, and the number of bytes of their storages."""
    size = os.fstat(file.fileno()).st_size
    if size == 0:
        raise damaged('it is empty')
    head = file.read(9)
    if head.startswith(SIGNATURE):
        return _read_zip(file, size, restore, mmap)
    if head.startswith(b'\x89HDF'):
        raise Refusal('is an HDF5 file', 'import it with tools/convert_checkpoint.py first')
    length = int.from_bytes(head[:8], 'little')
    is_table = head[8:] == b'{' and length < size
    if is_table or str(file.name).endswith('.safetensors'):
        if _LARGEST_TABLE < length < size:
            raise excessive(f'a table of {length} bytes')
        return _read_safetensors(file.name, restore, mmap), size
    return _read_legacy(file, size, restore)


def _read_zip(file: FileIO, size: int, restore: Restore, mmap: bool) -> tuple[Any, int]:
    """Read the format since torch 1.6: an archive of a pickle and the storages."""
    archive = Archive(file, size)
    folder = min(archive.entries, default='').partition('/')[0]
    names = {name.partition('/')[2] for name in archive.entries}
    if 'data.pkl' not in names or any(
        not name.startswith(f'{folder}/') for name in archive.entries
    ):
        raise damaged('its archive is not one folder with a data.pkl')
    order = sys.byteorder
    if 'byteorder' in names:
        order = archive.read(f'{folder}/byteorder').decode()
    if order not in ('little', 'big'):
        raise damaged(f'its byte order is {order!r}')
    mapped = (
        memory_map.mmap(file.fileno(), 0, access=memory_map.ACCESS_COPY) if mmap else None
    )
    loaded: dict[str, Storage] = {}

    def load_storage(reference: tuple) -> Storage:
        dtype, key, location, numel = reference
        length = _length(dtype, key, location, numel)
        if key in loaded:
            return loaded[key]
        name = f'{folder}/data/{key}'
        entry = archive.entries.get(name)
        if not entry or length != entry.size:
            raise damaged(f'its archive does not have the bytes of {name!r}')
        if mapped is not None and entry.size and entry.start % _ALIGNMENT == 0:
            archive.verify(name)
            values = torch.frombuffer(
                mapped, dtype=torch.uint8, offset=entry.start, count=entry.size
            )
        else:
            values = torch.empty(entry.size, dtype=torch.uint8)
            archive.read_into(name, memoryview(values.numpy()))
        storage = values.untyped_storage()
        if order != sys.byteorder:
            storage.byteswap(dtype)
        loaded[key] = Storage(restore(storage, location), dtype)
        return loaded[key]

    pickled = archive.read(f'{folder}/data.pkl')
    contents = Unpickler(io.BytesIO(pickled), len(pickled), load_storage).load()
    archive.verify_rest()
    return contents, sum(storage.bytes.nbytes() for storage in loaded.values())


def _read_legacy(file: FileIO, size: int, restore: Restore) -> tuple[Any, int]:
    """Read the format before torch 1.6: five pickles, then the storages."""
    whole = memory_map.mmap(file.fileno(), 0, access=memory_map.ACCESS_READ)
    if whole[257:262] == b'ustar':
        raise Refusal(
            'is in the format used before torch 0.1.10', 'save it again with a later torch'
        )
    # The memory that each storage is read into, and the storage on its device.
    loaded: dict[str, tuple[Tensor, Storage]] = {}
    views: dict[tuple, Storage] = {}
    held = 0

    def load_storage(reference: tuple) -> Storage:
        nonlocal held
        dtype, key, location, numel, view = reference
        length = _length(dtype, key, location, numel)
        if key not in loaded:
            held += length
            if held > size:
                raise damaged(f'it declares {held} bytes of tensors or more')
            values = torch.empty(length, dtype=torch.uint8)
            storage = restore(values.untyped_storage(), location)
            loaded[key] = values, Storage(storage, dtype)
        base = loaded[key][1]
        if view is None:
            return base
        name, *place = view
        start, length = (_length(dtype, name, location, number) for number in place)
        if start + length > base.bytes.nbytes():
            raise damaged('a view of a storage reaches beyond it')
        if name not in views:
            views[name] = Storage(base.bytes[start : start + length], dtype)
        return views[name]

    def load() -> Any:
        return Unpickler(whole, size, load_storage).load()

    if (load(), load(), type(load())) != (MAGIC_NUMBER, PROTOCOL_VERSION, dict):
        raise damaged('it does not begin like one')
    contents, keys = load(), load()
    named = type(keys) is list and all(type(key) is str for key in keys)
    if not named or sorted(keys) != sorted(loaded):
        raise damaged('its storages are not those that its tensors refer to')
    for key in keys:
        values, storage = loaded[key]
        start = whole.tell() + 8
        end = start + len(values)
        numel = int.from_bytes(whole.read(8), 'little')
        if end > size or numel * storage.dtype.itemsize != len(values):
            raise damaged('its storages are not as long as it declares')
        memoryview(values.numpy())[:] = memoryview(whole)[start:end]
        whole.seek(end)
        if sys.byteorder != 'little':
            values.untyped_storage().byteswap(storage.dtype)
        if storage.bytes.data_ptr() != values.data_ptr():
            storage.bytes.copy_(values.untyped_storage())
    return contents, held


def _length(dtype: Any, key: Any, location: Any, numel: Any) -> int:
    """The size in bytes of a storage that a pickle refers to."""
    if not (
        isinstance(dtype, torch.dtype)
        # Values of other types could take for ever to hash and compare.
        and type(key) is type(location) is str
        and type(numel) is int
        and numel >= 0
    ):
        raise damaged('it refers to a storage that it does not describe')
    return numel * dtype.itemsize


def _read_safetensors(path: str, restore: Restore, mmap: bool) -> dict[str, Any]:
    """Read the safetensors format: a table of names, shapes and offsets, then bytes."""
    with safe_open(path, framework='pt') as file:
        names = list(file.keys())
        if len(names) > _MOST_TENSORS:
            raise excessive(f'{len(names)} tensors')
        state = {name: file.get_tensor(name) for name in names}
        text = (file.metadata() or {}).get('meta', '{}')
    if len(text) > _LONGEST_META:
        raise excessive(f'a meta of {len(text)} characters')
    meta = _meta(text, path)
    for name, tensor in state.items():
        if stand_in := packed(tensor.dtype):
            state[name] = stand_in
            continue
        if not mmap or tensor.data_ptr() % _ALIGNMENT:
            tensor = tensor.clone()
        storage = restore(tensor.untyped_storage(), 'cpu')
        tensor = torch.empty(0, dtype=tensor.dtype, device=storage.device).set_(
            storage, tensor.storage_offset(), tensor.size(), tensor.stride()
        )
        state[name] = tensor
    return dict(state_dict=state, meta=meta)


def _meta(text: str, path: str) -> dict[str, Any]:
    """Parse the ``meta`` of a safetensors file; warn if it is not a JSON object."""
    try:
        meta = json.loads(text)
    except (ValueError, RecursionError):
        meta = None
    if isinstance(meta, dict):
        return meta
    print_log(
        f'The meta of {path} is not a JSON object: only the weights are read',
        logger='current',
        level=logging.WARNING,
    )
    return {}


def use_safe_reading() -> None:
    """Make mmengine read local checkpoints by :func:`read_checkpoint`.

    On torch>=2.6 mmengine 0.10 cannot read its own checkpoints at all: ``torch.load``
    refuses their ``HistoryBuffer``, so that resuming and testing fail.
    """
    CheckpointLoader.register_scheme(prefixes='', loader=load_from_local, force=True)


def load_from_local(filename: str, map_location: Any = None) -> Any:
    """The loader that :func:`use_safe_reading` registers."""
    # Not mapped: training may overwrite the file while it uses the tensors.
    checkpoint = read_checkpoint(filename, map_location, mmap=False)
    meta = checkpoint.get('meta') if isinstance(checkpoint, dict) else None
    if isinstance(meta, dict):
        # mmcv 1 stores a config there, which Runner.resume would run as Python code.
        meta.pop('config', None)
    return checkpoint
