"""Unpickle without running code, and with an amount of work limited by the file's size.

A pickle may name, call and change anything. Here each of the three is limited to a list:
tensors, plain containers, numpy arrays and scalars, and mmengine's ``HistoryBuffer``, which
are what mmengine's own checkpoints hold. A call is permitted only with arguments as pickle
writes them, so ``bytearray(10**12)`` is refused, and every step is charged to an allowance
that grows with the size of the file.
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

#: Charges in bytes: for a step, for a call, for hashing a key, and in addition for a key
#: that is neither text nor a number below the hash modulus (so that few keys can share a
#: hash); and the allowance of an empty pickle.
_STEP, _CALL, _HASHED, _KEY, _ALLOWANCE = 200, 1000, 32, 200_000, 400_000_000

_LONGEST_LINE = 1 << 16

#: Limit on a key: a tuple of doublings of doublings takes for ever to hash.
_MOST_PARTS = 100

#: numpy's limit; torch has none.
_MOST_AXES = 64

_COLLECTIONS = (list, tuple, torch.Size, set, frozenset)


def _arguments(function: Callable, *patterns: tuple) -> Callable:
    """Wrap ``function`` to accept only arguments of the types of one of the patterns."""

    def call(*arguments: Any) -> Any:
        if not any(
            len(arguments) == len(pattern) and all(map(_is_one_of, arguments, pattern))
            for pattern in patterns
        ):
            raise excessive(f'a call of {_name_of(function)} with unexpected arguments')
        return function(*arguments)

    # find_class returns the function itself in place of this wrapper.
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
        raise excessive('a call of collections.OrderedDict with unexpected arguments')
    return collections.OrderedDict(items or {})


_ordered_dict.named = collections.OrderedDict


def _range(*bounds: Any) -> range:
    if len(bounds) != 3 or not all(type(n) is int and n.bit_length() < 64 for n in bounds):
        raise excessive('a call of builtins.range with unexpected arguments')
    return range(*bounds)


_range.named = range


def _bytearray(data: Any = b'', encoding: Any = None) -> bytearray:
    """``bytearray`` of bytes, or of text as pickle writes it up to protocol 2."""
    if type(data) is str and type(encoding) is str and encoding == 'latin-1':
        return bytearray(data, 'latin-1')
    if type(data) is not bytes or encoding is not None:
        raise excessive('a call of builtins.bytearray with unexpected arguments')
    return bytearray(data)


_bytearray.named = bytearray


def _dtype(spec: str, *_: Any) -> np.dtype:
    """``numpy.dtype`` of numbers and strings.

    Not of objects, nor of records that could hold objects: numpy would use bytes of the
    file as pointers to them.
    """
    if type(spec) is not str or len(spec) > 20:
        raise unsafe('a numpy.dtype that is not given by name')
    dtype = np.dtype(spec, False, True)
    if dtype.kind not in 'biufcSU':
        raise unsafe(f'numpy.dtype({spec!r})')
    return dtype


def _empty_array(*_: Any) -> np.ndarray:
    """numpy's ``_reconstruct``, for arrays only; their state is set afterwards."""
    return np.empty(0, np.uint8)


def _from_buffer(data: bytes, dtype: np.dtype, shape: tuple, order: str) -> np.ndarray:
    """An array as pickle's protocol 5 writes it."""
    data = bytes(data) if type(data) is bytearray else data
    _check_array_state((1, shape, dtype, False, data))
    if _shown(order) not in ("'C'", "'F'"):
        raise damaged('a numpy.ndarray has an unknown memory order')
    return np.ndarray(shape, dtype, bytearray(data), order=order)


def _scalar(dtype: np.dtype, data: bytes) -> np.generic:
    if not isinstance(dtype, np.dtype) or type(data) is not bytes:
        raise damaged('a numpy scalar without its bytes')
    if len(data) != dtype.itemsize:
        raise damaged(f'a numpy scalar of {len(data)} bytes')
    return np.frombuffer(data, dtype)[0] if data else dtype.type()


def _encode(text: str, encoding: str) -> bytes:
    """``_codecs.encode`` to latin1, by which pickle writes bytes."""
    if type(text) is not str or type(encoding) is not str or encoding != 'latin1':
        raise unsafe(f'_codecs.encode to {_shown(encoding)}')
    return text.encode('latin1')


def _method(owner: Any, name: str) -> Any:
    """``getattr``, only for the methods that mmengine's checkpoints hold."""
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
    """Rebuild a tensor of torch's first two formats."""
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
    """Rebuild a tensor of torch's third format, for newer dtypes in untyped storages."""
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
    """Make a tensor as a view of a storage, which must hold all of its elements."""
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
        raise damaged(f'a tensor of shape {shape} exceeds its storage of {held} numbers')
    tensor = torch.empty(0, dtype=dtype, device=storage.bytes.device)
    tensor.set_(storage.bytes, offset, tuple(size), tuple(stride))
    if hooks:
        raise unsafe('a tensor with hooks')
    if metadata:
        # Bits of a view that is conjugated or negated only when it is used.
        if not (isinstance(metadata, dict) and metadata.keys() <= {'conj', 'neg'}):
            raise unsafe('a tensor with unknown metadata')
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

#: What a pickle may call, by the name that the pickle uses.
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
    # As a plain dict: keys of a ConfigDict are attributes, which could mislead checks.
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
    # Occurs only in sparse tensors, which are not read.
    'torch.serialization._get_layout': _standing_for('a sparse tensor', _DENSE),
}
_CALLABLE = {id(getattr(call, 'named', call)): call for call in _CALLED.values()}

#: Callables that hash the items of their argument.
_HASHING = (set, frozenset, collections.OrderedDict)

#: What a pickle may name but not call.
_NAMED = {
    **{f'builtins.{kind.__name__}': kind for kind in (int, float, bool, str)},
    'numpy.ndarray': np.ndarray,
    'argparse.Namespace': argparse.Namespace,
    # Occur only in tensors that are not read.
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

#: The dtype of a storage, by the name of its class; bytes for untyped storages.
_STORAGES = {'UntypedStorage': torch.uint8, '_UntypedStorage': torch.uint8} | {
    name: dtype for dtype, name in torch.storage._dtype_to_storage_type_map().items()
}

#: Returns the storage that a reference stands for.
LoadStorage = Callable[[tuple], Storage]


# pickle's Python implementation: the one in C cannot restrict calls and changes.
class Unpickler(pickle._Unpickler):
    """An unpickler that names, calls and changes only what a checkpoint needs.

    Args:
        file: The file with the pickle.
        size: Upper limit of the pickle's size in bytes.
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
            Refusal: If the pickle does something that is not permitted, or too much.
            Exception: If the pickle is broken; it may be of a dozen types.
        """
        self.stack, self.metastack, self.proto = [], [], 0
        self.append = self.stack.append
        try:
            while True:
                opcode = self.read(1)[0]
                self._spend(_STEP)
                if opcode not in self.dispatch:
                    raise damaged('it does not hold a pickle')
                self.dispatch[opcode](self)
        except pickle._Stop as stop:
            return stop.value

    def read(self, size: int) -> bytes:
        """Read exactly ``size`` bytes."""
        data = self._file_read(size)
        if len(data) != size:
            raise damaged('it ends within a pickle')
        return data

    def readline(self) -> bytes:
        """Read a line, which holds a name or a number."""
        line = self._file_readline()
        if not line.endswith(b'\n') or len(line) > _LONGEST_LINE:
            raise damaged('it ends within a line, or has a line that is too long')
        return line

    def _spend(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise excessive('more values than its size can justify')

    def find_class(self, module: str, name: str) -> Any:
        """Look up a name in what may be called and what may be named."""
        if self.proto < 3:
            # Protocols below 3 use the names of Python 2.
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
            kind = f'a distributed tensor ({whole})'
            raise unsupported(kind, '', 'gather the full state dict and save that')
        if module.partition('.')[0] == 'ml_dtypes':
            kind = f'an array of a dtype that numpy does not have ({whole})'
            raise unsupported(kind, '', 'save it as float32 or as a tensor')
        raise unsafe(whole)

    def persistent_load(self, pid: Any) -> Storage:
        """Return the storage that a tensor refers to."""
        if not (type(pid) is tuple and pid and pid[0] == 'storage'):
            raise unsafe('a reference to something other than a storage')
        return self._load_storage(pid[1:])

    def load_persid(self) -> None:
        """Refuse a reference in the form of text, which torch does not write."""
        raise damaged('it refers to something by a line of text')

    def load_reduce(self) -> None:
        """Call a function, if that is permitted."""
        arguments, function = self.stack.pop(), self.stack[-1]
        call = _CALLABLE.get(id(function))
        if call is None:
            raise unsafe(f'a call of {_name_of(function)}')
        if type(arguments) is not tuple:
            raise damaged('it calls something without a tuple of arguments')
        # The call may go through all of its arguments, whatever it returns.
        self._spend(_CALL + sys.getsizeof(arguments) + sum(map(sys.getsizeof, arguments)))
        if function in _HASHING and type(arguments[0] if arguments else 0) in (list, tuple):
            self._check_keys(arguments[0])
        self.stack[-1] = call(*arguments)
        self._spend(sys.getsizeof(self.stack[-1]))

    def load_newobj(self) -> None:
        """Make a ``HistoryBuffer``, or a dict in place of an ``argparse.Namespace``."""
        arguments, cls = self.stack.pop(), self.stack.pop()
        if cls not in (HistoryBuffer, argparse.Namespace) or arguments:
            raise unsafe(f'an object of {_name_of(cls)}')
        self._spend(_CALL)
        self.append(HistoryBuffer() if cls is HistoryBuffer else {})

    def load_build(self) -> None:
        """Set the state of an object, if it is one that its type may have."""
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
            # A state dict: the state holds its modules' versions.
            vars(instance).update(state)
        elif kind is type(state) is dict:
            # The dict in place of an argparse.Namespace.
            self._spend(sys.getsizeof(state))
            self._check_keys(state)
            instance.update(state)
        elif kind is HistoryBuffer:
            # Only what it has: its __setstate__ would also set methods of the class.
            own = vars(instance).keys() & state.keys()
            vars(instance).update((key, state[key]) for key in own)
        else:
            raise unsafe(f'a changed {_name_of(instance)}')

    def load_inst(self) -> None:
        """Refuse an object of an old-style class."""
        module, name = (self.readline()[:-1].decode('ascii') for _ in range(2))
        raise unsafe(f'an object of {module}.{name}')

    def refuse(self) -> None:
        """Refuse an object that is made in another way."""
        raise unsafe('an object of an unusual kind')

    def load_frame(self) -> None:
        """Ignore how a pickle is cut into frames."""
        self.read(8)

    def load_bytearray8(self) -> None:
        """Read a bytearray; allocate no memory for bytes that the file does not have."""
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
        """Make a dict of keys and values."""
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
        """Make a frozenset."""
        items = self.pop_mark()
        self._check_keys(items)
        self.append(frozenset(items))

    def _update(self, items: list) -> None:
        self._check_keys(items[::2])
        pairs = zip(items[::2], items[1::2], strict=True)
        # A Counter would count the pairs: its contents are the argument of its call.
        self._own(dict, collections.OrderedDict, collections.defaultdict).update(pairs)

    def _own(self, *kinds: type) -> Any:
        """The container on top of the stack, which must be of one of these types."""
        if type(self.stack[-1]) not in kinds:
            raise unsafe(f'a changed {_name_of(self.stack[-1])}')
        return self.stack[-1]

    def _check_keys(self, keys: list | tuple | dict) -> None:
        """Refuse keys that would take for ever to hash or compare."""
        self._spend(_HASHED * len(keys))
        for key in keys:
            kind = type(key)
            if kind in (str, bytes, bool, float, type(None)):
                continue
            if kind is not int or abs(key) >= sys.hash_info.modulus:
                self._spend(_KEY)
                _check_parts(key)


def _paying(load: Callable[[Unpickler], None]) -> Callable[[Unpickler], None]:
    """Charge for a text, which may take more memory than its bytes in the file."""

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
    """The ``repr`` of a text, or the type of anything else, which may be endless."""
    return repr(value) if type(value) is str else _name_of(value)


def _name_of(value: Any) -> str:
    if not hasattr(value, '__qualname__'):
        value = type(value)
    return f'{value.__module__}.{value.__qualname__}'


def _check_parts(key: Any) -> None:
    """Check that a key has few parts, each counted as often as it is hashed."""
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
    """Check that an array has as many bytes as its shape and dtype need."""
    _, shape, dtype, _, data = state
    if not (
        type(data) is bytes
        and type(shape) is tuple
        and len(shape) <= _MOST_AXES
        and all(type(size) is int and 0 <= size < 1 << 63 for size in shape)
        and len(data) == math.prod(shape) * dtype.itemsize
        and math.prod(shape) <= len(data)
    ):
        raise damaged('a numpy.ndarray has a shape that does not fit its bytes')
