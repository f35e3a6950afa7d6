"""Unpickle without running code, and without more work than the pickle is long.

A pickle may name, call and change anything. Here there is a list for each of the three:
tensors, plain containers, numpy arrays and scalars, and mmengine's ``HistoryBuffer``, which
is what mmengine's own checkpoints hold. What is called takes the arguments that pickle
writes for it, so that ``bytearray(10**12)`` is none of them, and everything is paid for
from an allowance that grows with the size of the file.
"""

import _compat_pickle
import argparse
import collections
import datetime
import math
import pickle
import struct
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.optim.scheduler import param_scheduler
from torch import Tensor, nn

from .contents import Storage, Unsupported, packed
from .refusals import damaged, excessive, unsafe, unsupported

#: In bytes: what a step and a call may take at most, the time for a key, that for one that
#: is no number or text (so that few can have the same hash), and what a pickle without
#: bytes may take.
_STEP, _CALL, _HASHED, _KEY, _ALLOWANCE = 200, 1000, 32, 200_000, 400_000_000

_LONGEST_LINE = 1 << 16

#: Of a key: one whose parts are each twice the part before is hashed for ever.
_MOST_PARTS = 100

#: Numpy has no more; torch has no bound.
_MOST_AXES = 64

_COLLECTIONS = (list, tuple, torch.Size, set, frozenset)


def _arguments(function: Callable, *patterns: tuple) -> Callable:
    """``function``, for arguments of the types of one of the patterns."""

    def call(*arguments: Any) -> Any:
        if not any(
            len(arguments) == len(pattern) and all(map(_is_one_of, arguments, pattern))
            for pattern in patterns
        ):
            raise excessive(f'a call of {_name_of(function)} with other arguments')
        return function(*arguments)

    # What a pickle names is the function itself.
    call.named = function
    return call


def _is_one_of(value: Any, kinds: type | tuple[type, ...]) -> bool:
    return type(value) in (kinds if isinstance(kinds, tuple) else (kinds,))


_FACTORIES = (
    *(None, list, dict, set, tuple, int, float, str, bool, collections.OrderedDict),
    *(collections.deque, collections.Counter),
)


def _default_dict(factory: Any, items: Any = None) -> collections.defaultdict:
    if factory not in _FACTORIES or type(items) not in (dict, type(None)):
        raise unsafe(f'a collections.defaultdict of {_name_of(factory)}')
    return collections.defaultdict(factory, items or {})


def _ordered_dict(items: Any = None) -> collections.OrderedDict:
    # A list of pairs is what Python 2 wrote.
    pairs = type(items) is list and all(_is_one_of(pair, (list, tuple)) for pair in items)
    if not (pairs or type(items) in (dict, type(None))):
        raise excessive('a call of collections.OrderedDict with other arguments')
    return collections.OrderedDict(items or {})


_ordered_dict.named = collections.OrderedDict


def _range(*bounds: Any) -> range:
    if len(bounds) != 3 or not all(type(n) is int and n.bit_length() < 64 for n in bounds):
        raise excessive('a call of builtins.range with other arguments')
    return range(*bounds)


_range.named = range


def _bytearray(data: Any = b'', encoding: Any = None) -> bytearray:
    """``bytearray`` as pickle writes it, of text up to its protocol 2."""
    if type(data) is str and type(encoding) is str and encoding == 'latin-1':
        return bytearray(data, 'latin-1')
    if type(data) is not bytes or encoding is not None:
        raise excessive('a call of builtins.bytearray with other arguments')
    return bytearray(data)


_bytearray.named = bytearray


def _dtype(spec: str, *_: Any) -> np.dtype:
    """``numpy.dtype`` of numbers and strings.

    Not of objects, nor of records that could hold some: numpy would take bytes of the
    file for pointers to them.
    """
    if type(spec) is not str or len(spec) > 20:
        raise unsafe('a numpy.dtype that is not named')
    dtype = np.dtype(spec, False, True)
    if dtype.kind not in 'biufcSU':
        raise unsafe(f'numpy.dtype({spec!r})')
    return dtype


def _empty_array(*_: Any) -> np.ndarray:
    """``_reconstruct`` of numpy, for arrays alone; the state fills it."""
    return np.empty(0, np.uint8)


def _from_buffer(data: bytes, dtype: np.dtype, shape: tuple, order: str) -> np.ndarray:
    """An array as pickle's protocol 5 writes it."""
    data = bytes(data) if type(data) is bytearray else data
    _check_array_state((1, shape, dtype, False, data))
    if _shown(order) not in ("'C'", "'F'"):
        raise damaged('a numpy.ndarray has its numbers in no order')
    return np.ndarray(shape, dtype, bytearray(data), order=order)


def _scalar(dtype: np.dtype, data: bytes) -> np.generic:
    if not isinstance(dtype, np.dtype) or type(data) is not bytes:
        raise damaged('a number of numpy without its bytes')
    if len(data) != dtype.itemsize:
        raise damaged(f'a number of numpy of {len(data)} bytes')
    return np.frombuffer(data, dtype)[0] if data else dtype.type()


def _encode(text: str, encoding: str) -> bytes:
    """``_codecs.encode`` as pickle writes bytes with it."""
    if type(text) is not str or type(encoding) is not str or encoding != 'latin1':
        raise unsafe(f'_codecs.encode to {_shown(encoding)}')
    return text.encode('latin1')


def _method(owner: Any, name: str) -> Any:
    """``getattr`` of the methods that mmengine's checkpoints hold."""
    if type(name) is not str or (owner, name) not in _METHODS:
        raise unsafe(f'builtins.getattr of {_shown(name)}')
    return getattr(owner, name)


_METHODS = [
    *((HistoryBuffer, name) for name in ('min', 'max', 'mean', 'current')),
    *(
        (param_scheduler.OneCycleParamScheduler, f'_annealing_{strategy}')
        for strategy in ('cos', 'linear')
    ),
]


def _rebuild_tensor(
    storage: Storage, offset: int, size: tuple, stride: tuple, *options: Any
) -> Tensor:
    """A tensor of torch's first two formats."""
    return _tensor(storage, storage.dtype, offset, size, stride, *options)


def _rebuild_tensor_v3(
    storage: Storage,
    offset: int,
    size: tuple,
    stride: tuple,
    requires_grad: bool,
    hooks: Any,
    dtype: torch.dtype,
    *metadata: Any,
) -> Tensor:
    """A tensor of the format of the newer dtypes, whose storage says bytes."""
    return _tensor(storage, dtype, offset, size, stride, requires_grad, hooks, *metadata)


def _tensor(
    storage: Storage,
    dtype: torch.dtype,
    offset: int,
    size: tuple,
    stride: tuple,
    requires_grad: bool = False,
    hooks: Any = None,
    metadata: dict[str, bool] | None = None,
) -> Tensor | Unsupported:
    """A view of a storage, which must hold all of it."""
    if not (isinstance(storage, Storage) and isinstance(dtype, torch.dtype)):
        raise damaged('a tensor has no storage')
    if stand_in := packed(dtype):
        return stand_in
    if not (
        _is_one_of(size, (tuple, torch.Size))
        and _is_one_of(stride, (tuple, torch.Size))
        and len(size) == len(stride) <= _MOST_AXES
        and all(type(n) is int and 0 <= n < 1 << 63 for n in (offset, *size, *stride))
    ):
        raise damaged('a tensor has an impossible shape')
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    held = storage.bytes.nbytes() // dtype.itemsize
    if all(size) and last >= held:
        shape = f'{tuple(size)} and strides {tuple(stride)} from {offset} on'
        raise damaged(f'a tensor of shape {shape} is said to be in {held} numbers')
    tensor = torch.empty(0, dtype=dtype, device=storage.bytes.device)
    tensor.set_(storage.bytes, offset, tuple(size), tuple(stride))
    if hooks:
        raise unsafe('a tensor with hooks')
    if metadata:
        # Whether it is conjugated or negated only when it is used.
        if not (isinstance(metadata, dict) and metadata.keys() <= {'conj', 'neg'}):
            raise unsafe('a tensor with other properties')
        torch._utils.set_tensor_metadata(tensor, metadata)
    return tensor.requires_grad_(bool(requires_grad))


def _rebuild_parameter(data: Tensor, requires_grad: bool, hooks: Any) -> nn.Parameter:
    if hooks:
        raise unsafe('a parameter with hooks')
    if isinstance(data, Unsupported):
        return data
    if not isinstance(data, Tensor):
        raise damaged('a parameter has no tensor')
    return nn.Parameter(data, bool(requires_grad))


def _standing_for(kind: str, remedy: str) -> Callable:
    return lambda *arguments: Unsupported(kind, remedy)


_DENSE = 'make it dense with to_dense() and save again'
_UNSUPPORTED = {
    '_rebuild_sparse_tensor': ('a sparse tensor', _DENSE),
    '_rebuild_nested_tensor': ('a nested tensor', 'save the tensors in it'),
    '_rebuild_qtensor': ('a quantized tensor', 'dequantize it and save again'),
    '_rebuild_meta_tensor_no_storage': (
        *('a tensor without values, on the meta device', 'save it with its values'),
    ),
    '_rebuild_parameter_with_state': (
        *('a parameter with attributes of its own', 'save its values alone'),
    ),
    **dict.fromkeys(
        (
            *('_rebuild_wrapper_subclass', '_rebuild_xla_tensor'),
            *(
                '_rebuild_device_tensor_from_numpy',
                '_rebuild_device_tensor_from_cpu_tensor',
            ),
        ),
        ('a tensor that only its own device or package reads', 'save it as a CPU tensor'),
    ),
}

_NOTHING = ()
_NUMBER = (int, float)

#: What a pickle may call, by the name under which it does.
_CALLED = {
    **{
        f'{known.__module__}.{known.__name__}': _arguments(known, *patterns)
        for known, patterns in {
            list: [_NOTHING, (_COLLECTIONS,)],
            tuple: [_NOTHING, (_COLLECTIONS,)],
            set: [_NOTHING, (_COLLECTIONS,)],
            frozenset: [_NOTHING, (_COLLECTIONS,)],
            dict: [_NOTHING, (dict,)],
            slice: [((int, type(None)),) * 3],
            complex: [(_NUMBER, _NUMBER)],
            bytes: [_NOTHING, (bytes,)],
            collections.deque: [
                *(_NOTHING, ((list, tuple),), ((list, tuple), (int, type(None)))),
            ],
            collections.Counter: [_NOTHING, (dict,)],
            datetime.datetime: [(bytes,), (bytes, datetime.timezone)],
            datetime.date: [(bytes,)],
            datetime.timedelta: [(int, int, int)],
            datetime.timezone: [(datetime.timedelta,), (datetime.timedelta, str)],
            torch.Size: [_NOTHING, ((list, tuple),)],
            torch.device: [(str,), (str, int)],
        }.items()
    },
    'builtins.range': _range,
    'builtins.bytearray': _bytearray,
    'collections.defaultdict': _default_dict,
    'collections.OrderedDict': _ordered_dict,
    # A plain dict serves, and has no attributes that could pass for something else.
    'mmengine.config.config.ConfigDict': _arguments(dict, _NOTHING, (dict,)),
    'builtins.getattr': _method,
    '_codecs.encode': _encode,
    'numpy.dtype': _dtype,
    **{
        f'numpy.{core}.multiarray.{name}': known
        for core in ('core', '_core')
        for name, known in (('_reconstruct', _empty_array), ('scalar', _scalar))
    },
    **{f'numpy.{core}.numeric._frombuffer': _from_buffer for core in ('core', '_core')},
    'torch._utils._rebuild_tensor': _rebuild_tensor,
    'torch._utils._rebuild_tensor_v2': _rebuild_tensor,
    'torch._utils._rebuild_tensor_v3': _rebuild_tensor_v3,
    'torch._utils._rebuild_parameter': _rebuild_parameter,
    **{f'torch._utils.{name}': _standing_for(*told) for name, told in _UNSUPPORTED.items()},
    'torch._tensor._rebuild_from_type_v2': _standing_for(
        *('a tensor with attributes or of a class of its own', 'save its values alone'),
    ),
    # Only of tensors that are not read.
    'torch.serialization._get_layout': _standing_for('a sparse tensor', _DENSE),
}
_CALLABLE = {id(getattr(call, 'named', call)): call for call in _CALLED.values()}

#: What hashes the items of its argument.
_HASHING = (set, frozenset, collections.OrderedDict)

#: What it may only name.
_NAMED = {
    **{f'builtins.{kind.__name__}': kind for kind in (int, float, bool, str)},
    'numpy.ndarray': np.ndarray,
    'argparse.Namespace': argparse.Namespace,
    # Of tensors that are not read.
    'torch.Tensor': Tensor,
    'torch.nn.parameter.Parameter': nn.Parameter,
    **{f'{owner.__module__}.{owner.__name__}': owner for owner, _ in _METHODS},
    **{
        f'{owner.__module__}.{owner.__name__}.{name}': getattr(owner, name)
        for owner, name in _METHODS
    },
    **{
        f'torch.{name}': value
        for name, value in vars(torch).items()
        if isinstance(value, torch.dtype | torch.qscheme)
    },
}

#: What a storage holds, by the name of its class; the newer ones do not say.
_STORAGES = {'UntypedStorage': torch.uint8, '_UntypedStorage': torch.uint8} | {
    name: dtype for dtype, name in torch.storage._dtype_to_storage_type_map().items()
}

#: Makes the storage that a reference means.
LoadStorage = Callable[[tuple], Storage]


# In Python rather than C: only here can calls and changes be restricted, too.
class Unpickler(pickle._Unpickler):
    """Names, calls and changes what a checkpoint needs, and nothing else.

    Args:
        file: What holds the pickle.
        size: How many bytes it can have at most.
        load_storage: Called for every reference to a storage.
    """

    dispatch = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: BinaryIO, size: int, load_storage: LoadStorage) -> None:
        super().__init__(file, encoding='utf-8')
        self._load_storage = load_storage
        self._left = _ALLOWANCE + 2 * size

    def load(self) -> Any:
        """Unpickle.

        Raises:
            Refusal: If the pickle does what is on no list, or too much.
            Exception: pickle has a dozen types for one that is broken.
        """
        self.stack, self.metastack, self.proto = [], [], 0
        self.append = self.stack.append
        try:
            while True:
                opcode = self.read(1)[0]
                self._spend(_STEP)
                if opcode not in self.dispatch:
                    raise damaged('it holds no pickle')
                self.dispatch[opcode](self)
        except pickle._Stop as stop:
            return stop.value

    def read(self, size: int) -> bytes:
        """As many bytes as were asked for."""
        data = self._file_read(size)
        if len(data) != size:
            raise damaged('it ends within a pickle')
        return data

    def readline(self) -> bytes:
        """A line of a name or a number."""
        line = self._file_readline()
        if not line.endswith(b'\n') or len(line) > _LONGEST_LINE:
            raise damaged('it ends within a line, or the line within it does not')
        return line

    def _spend(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise excessive('more values than its size can justify')

    def find_class(self, module: str, name: str) -> Any:
        """Look a name up on the two lists."""
        if self.proto < 3:
            # Such a pickle has the names of Python 2.
            module, name = _compat_pickle.NAME_MAPPING.get(
                (module, name), (_compat_pickle.IMPORT_MAPPING.get(module, module), name)
            )
        if module.partition('.')[0] == 'torch' and name in _STORAGES:
            return _STORAGES[name]
        whole = f'{module}.{name}'
        known = _CALLED.get(whole, _NAMED.get(whole))
        if known is not None:
            return getattr(known, 'named', known)
        if module.startswith('torch.distributed.'):
            kind = f'a tensor in pieces ({whole})'
            raise unsupported(kind, '', 'gather the full state dict and save that')
        if module.partition('.')[0] == 'ml_dtypes':
            kind = f'an array of numbers that numpy does not have ({whole})'
            raise unsupported(kind, '', 'save it as float32 or as a tensor')
        raise unsafe(whole)

    def persistent_load(self, pid: Any) -> Storage:
        """The storage that a tensor is in."""
        if not (type(pid) is tuple and pid and pid[0] == 'storage'):
            raise unsafe('a reference to something else than the bytes of a tensor')
        return self._load_storage(pid[1:])

    def load_persid(self) -> None:
        """Take no reference in text, which torch does not write."""
        raise damaged('it refers to something by a line of text')

    def load_reduce(self) -> None:
        """Call what may be called."""
        arguments, function = self.stack.pop(), self.stack[-1]
        call = _CALLABLE.get(id(function))
        if call is None:
            raise unsafe(f'a call of {_name_of(function)}')
        if type(arguments) is not tuple:
            raise damaged('it calls something without a tuple of arguments')
        # What a call goes through, whatever it makes of it.
        self._spend(_CALL + sys.getsizeof(arguments) + sum(map(sys.getsizeof, arguments)))
        if function in _HASHING and type(arguments[0] if arguments else 0) in (list, tuple):
            self._check_keys(arguments[0])
        self.stack[-1] = call(*arguments)
        self._spend(sys.getsizeof(self.stack[-1]))

    def load_newobj(self) -> None:
        """Make a ``HistoryBuffer``, or a dict for what a command line gave."""
        arguments, cls = self.stack.pop(), self.stack.pop()
        if cls not in (HistoryBuffer, argparse.Namespace) or arguments:
            raise unsafe(f'an object of {_name_of(cls)}')
        self._spend(_CALL)
        self.append(HistoryBuffer() if cls is HistoryBuffer else {})

    def load_build(self) -> None:
        """Give an object its state, if the state is one that it has itself."""
        state, instance = self.stack.pop(), self.stack[-1]
        kind = type(instance)
        if kind is np.ndarray:
            _check_array_state(state)
            self._spend(len(state[-1]))
            instance.__setstate__(state)
        elif isinstance(instance, np.dtype):
            _check_dtype_state(instance, state)
            instance.__setstate__(state)
        elif kind is collections.OrderedDict and state.keys() <= {'_metadata'}:
            # Of a state dict: the versions of its modules.
            vars(instance).update(state)
        elif kind is type(state) is dict:
            # Of a command line.
            self._spend(sys.getsizeof(state))
            self._check_keys(state)
            instance.update(state)
        elif kind is HistoryBuffer:
            # Its methods would be set for the class, which has them.
            own = vars(instance).keys() & state.keys()
            vars(instance).update((key, state[key]) for key in own)
        else:
            raise unsafe(f'a changed {_name_of(instance)}')

    def load_inst(self) -> None:
        """Make no object of an old-style class."""
        module, name = (self.readline()[:-1].decode('ascii') for _ in range(2))
        raise unsafe(f'an object of {module}.{name}')

    def refuse(self) -> None:
        """Make no object in another way."""
        raise unsafe('an object of an unusual kind')

    def load_frame(self) -> None:
        """Take no notice of how a pickle is cut into frames."""
        self.read(8)

    def load_bytearray8(self) -> None:
        """Bytes that are there, not memory for as many as are said."""
        (size,) = struct.unpack('<Q', self.read(8))
        self.append(bytearray(self.read(size)))

    def load_setitem(self) -> None:
        """Put a value into a dict."""
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def load_setitems(self) -> None:
        """Put values into a dict."""
        items = self.pop_mark()
        self._update(items)

    def load_dict(self) -> None:
        """Make a dict of values."""
        items = self.pop_mark()
        self.append({})
        self._update(items)

    def load_appends(self) -> None:
        """Put values into a list or a deque."""
        items = self.pop_mark()
        self._own(list, collections.deque).extend(items)

    def load_append(self) -> None:
        """Put a value into a list or a deque."""
        item = self.stack.pop()
        self._own(list, collections.deque).append(item)

    def load_additems(self) -> None:
        """Put values into a set."""
        items = self.pop_mark()
        self._check_keys(items)
        self._own(set).update(items)

    def load_frozenset(self) -> None:
        """Make a set that stays as it is."""
        items = self.pop_mark()
        self._check_keys(items)
        self.append(frozenset(items))

    def _update(self, items: list) -> None:
        self._check_keys(items[::2])
        pairs = zip(items[::2], items[1::2], strict=True)
        # A Counter would count the pairs: its contents are the argument of its call.
        self._own(dict, collections.OrderedDict, collections.defaultdict).update(pairs)

    def _own(self, *kinds: type) -> Any:
        """The container on the stack."""
        if type(self.stack[-1]) not in kinds:
            raise unsafe(f'a changed {_name_of(self.stack[-1])}')
        return self.stack[-1]

    def _check_keys(self, keys: list | tuple | dict) -> None:
        """Refuse what would be hashed or compared for ever."""
        self._spend(_HASHED * len(keys))
        for key in keys:
            kind = type(key)
            if kind in (str, bytes, bool, float, type(None)):
                continue
            if kind is not int or abs(key) >= sys.hash_info.modulus:
                self._spend(_KEY)
                _check_parts(key)


def _paying(load: Callable[[Unpickler], None]) -> Callable[[Unpickler], None]:
    """Pay for a text, whose characters may be wider than its bytes."""

    def load_text(self: Unpickler) -> None:
        load(self)
        self._spend(sys.getsizeof(self.stack[-1]))

    return load_text


Unpickler.dispatch |= {
    opcode[0]: _paying(Unpickler.dispatch[opcode[0]])
    for opcode in (
        *(pickle.UNICODE, pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8),
        *(pickle.STRING, pickle.BINSTRING, pickle.SHORT_BINSTRING),
    )
} | {
    opcode[0]: method
    for opcode, method in {
        pickle.REDUCE: Unpickler.load_reduce,
        pickle.NEWOBJ: Unpickler.load_newobj,
        pickle.BUILD: Unpickler.load_build,
        pickle.INST: Unpickler.load_inst,
        pickle.OBJ: Unpickler.refuse,
        pickle.NEWOBJ_EX: Unpickler.refuse,
        pickle.PERSID: Unpickler.load_persid,
        pickle.FRAME: Unpickler.load_frame,
        pickle.BYTEARRAY8: Unpickler.load_bytearray8,
        pickle.SETITEM: Unpickler.load_setitem,
        pickle.SETITEMS: Unpickler.load_setitems,
        pickle.APPEND: Unpickler.load_append,
        pickle.APPENDS: Unpickler.load_appends,
        pickle.DICT: Unpickler.load_dict,
        pickle.ADDITEMS: Unpickler.load_additems,
        pickle.FROZENSET: Unpickler.load_frozenset,
    }.items()
}


def _shown(value: Any) -> str:
    """A text as it is, and of anything else its type: it may be endless."""
    return repr(value) if type(value) is str else _name_of(value)


def _name_of(value: Any) -> str:
    if not hasattr(value, '__qualname__'):
        value = type(value)
    return f'{value.__module__}.{value.__qualname__}'


def _check_parts(key: Any) -> None:
    """Check that a key has few parts, counted as often as they are hashed."""
    count, rest = 0, [key]
    while rest:
        part = rest.pop()
        parts = part if isinstance(part, tuple | list | frozenset) else ()
        count += 1 + len(parts)
        if count > _MOST_PARTS:
            raise excessive(f'a key of more than {_MOST_PARTS} parts')
        rest.extend(parts)


def _check_dtype_state(dtype: np.dtype, state: tuple) -> None:
    """Check that a state changes nothing but the byte order."""
    order = state[1] if state[1] in ('<', '>') else '='
    if state != dtype.newbyteorder(order).__reduce__()[2]:
        raise unsafe(f'a changed numpy.dtype {dtype.name!r}')


def _check_array_state(state: tuple) -> None:
    """Check that the bytes of an array are as many as its shape and dtype say."""
    _, shape, dtype, _, data = state
    if not (
        type(data) is bytes
        and type(shape) is tuple
        and len(shape) <= _MOST_AXES
        and all(type(size) is int and 0 <= size < 1 << 63 for size in shape)
        and len(data) == math.prod(shape) * dtype.itemsize
        and math.prod(shape) <= len(data)
    ):
        raise damaged('a numpy.ndarray has another shape than its bytes')
