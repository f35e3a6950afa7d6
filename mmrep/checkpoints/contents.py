"""Check the number, depth and types of the values read, so that walking them ends."""

import collections
import datetime
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from torch import Tensor

from .refusals import damaged, excessive, unsupported

#: Limits. Training writes a dozen levels, and a few values for every weight.
_DEEPEST, _MOST_VALUES = 100, 500_000

#: Limit on the bytes of all tensors, which may share storages (tied or expanded): this
#: multiple of the bytes of the storages, plus a constant for small files.
_TIED, _EXPANDED = 4, 1 << 28

_LONGEST_NAME, _LONGEST_NUMBER = 500, 1024

_MAPPINGS = (dict, collections.OrderedDict, collections.defaultdict, collections.Counter)
_SEQUENCES = (list, tuple, torch.Size, set, frozenset, collections.deque)
_LEAVES = frozenset(
    (
        *(type(None), bool, float, complex, bytes, bytearray, slice),
        *(torch.dtype, torch.device, type, type(lambda: None)),
        *(datetime.datetime, datetime.date, datetime.timedelta, datetime.timezone),
    )
)

#: Dtypes that are quantized, bare bits, or of less than a byte.
_PACKED = re.compile(r'torch\.(q|bits|float4|u?int[1-7]$)')


class Unsupported(NamedTuple):
    """Placeholder for a value that cannot be read, until its place is known.

    Args:
        kind: What the value is.
        remedy: What the user can do.
    """

    kind: str
    remedy: str


def packed(dtype: torch.dtype) -> Unsupported | None:
    """The placeholder for a dtype that torch can store but not copy, else ``None``."""
    if not _PACKED.match(str(dtype)):
        return None
    return Unsupported(f'a tensor of {dtype}', 'dequantize it and save again')


class Storage(NamedTuple):
    """A storage of tensors that a pickle refers to.

    Args:
        bytes: The bytes.
        dtype: The dtype of the numbers in them.
    """

    bytes: torch.UntypedStorage
    dtype: torch.dtype


def check_contents(root: Any, held: int) -> None:
    """Refuse contents with too many values or levels, or with values of unknown types.

    A pickle can build a list that holds the previous list twice: after thirty such steps,
    walking it visits 2^30 lists. Here a value counts once for every path that leads to it,
    so cycles and doublings exceed the limits on depth and number.

    Args:
        root: What was read.
        held: How many bytes of storages were read.

    Raises:
        Refusal: Names the value and its place.
    """
    count, shown = 0, 0
    path: list[Any] = []
    levels = [iter([('', root)])]
    while levels:
        for key, value in levels[-1]:
            count += 1
            if count > _MOST_VALUES:
                raise excessive(f'more than {_MOST_VALUES} values')
            if type(value) is str:
                # Long text counts for more, since it may occur many times.
                count += len(value) >> 10
                _check_text(value, [*path, key])
            elif type(value) is int:
                if value.bit_length() > _LONGEST_NUMBER:
                    raise excessive(f'a number of {value.bit_length()} bits')
            elif isinstance(value, Tensor):
                shown += value.numel() * value.element_size()
                if shown > _TIED * held + _EXPANDED:
                    raise excessive(
                        f'tensors of {shown} bytes and more in {held} bytes of storage'
                    )
                _check_name(key)
            elif type(value) in _MAPPINGS or type(value) in _SEQUENCES:
                if len(levels) > _DEEPEST:
                    raise excessive(f'values more than {_DEEPEST} levels deep')
                path.append(key)
                levels.append(_children(value))
                break
            else:
                count += _check_leaf(value, [*path, key])
        else:
            levels.pop()
            if path:
                path.pop()


def _children(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict):
        yield from value.items()
        yield from (('a key', key) for key in value)
        if type(value) is collections.OrderedDict and vars(value):
            yield '_metadata', _metadata(vars(value)['_metadata'])
    else:
        yield from enumerate(value)


def _metadata(value: Any) -> Any:
    """Check a state dict's ``_metadata``, which torch uses without checking it."""
    if not isinstance(value, dict) or not all(
        isinstance(module, dict) and isinstance(module.get('version', 1), int | None)
        for module in value.values()
    ):
        raise damaged('the versions of its modules are not a dict of dicts')
    return value


def _check_leaf(value: Any, path: list) -> int:
    """Check a value without children; returns how many more values it counts for."""
    if type(value) in _LEAVES:
        return 0
    if isinstance(value, Unsupported):
        raise unsupported(value.kind, f' ({_place(path)})', value.remedy)
    if isinstance(value, np.generic | np.ndarray):
        if value.dtype.kind == 'U' and value.size <= _MOST_VALUES:
            # numpy stores any 32 bits per character, also ones that are no character.
            for text in np.asarray(value).ravel().tolist():
                _check_text(text, path)
        return value.size + (value.nbytes >> 10)
    if type(value) is range:
        return max(0, (value.stop - value.start) // value.step)
    if type(value) is HistoryBuffer:
        _check_history(value, path)
        return 0
    if isinstance(value, np.dtype):
        return 0
    if isinstance(value, Storage):
        raise unsupported(f'a bare storage ({_place(path)})', '', 'save it as a tensor')
    raise damaged(f'{_place(path)} is a {type(value).__name__}')


def _check_text(text: str, path: list) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise damaged(f'{_place(path)} is not Unicode text') from None


def _check_name(key: Any) -> None:
    if isinstance(key, str) and (len(key) > _LONGEST_NAME or not key.isprintable()):
        raise excessive(f'a weight of the name {key[:40]!r}..., of {len(key)} characters')


def _check_history(buffer: HistoryBuffer, path: list) -> None:
    """Check that a history holds two arrays of numbers of the same length."""
    logs, counts = buffer.data
    if not (
        all(type(part) is np.ndarray and part.ndim == 1 for part in (logs, counts))
        and all(part.dtype.kind in 'biuf' for part in (logs, counts))
        and len(logs) == len(counts)
        and type(buffer.max_length) is int
    ):
        raise damaged(f'{_place(path)} is not a history of numbers')


def _place(path: list) -> str:
    """The keys that lead to a value, joined by dots."""
    keys = (str(key)[:_LONGEST_NAME] for key in path[1:] if type(key) in (str, int))
    return ascii('.'.join(keys))[1:-1] or 'the top level'
