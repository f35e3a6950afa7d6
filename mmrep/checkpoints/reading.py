"""Read checkpoints without running code from them.

A checkpoint is a pickle, and a pickle may name, call and change anything.
:func:`read_checkpoint` unpickles with a list for each of the three: tensors, plain
containers, numpy arrays and scalars, and mmengine's ``HistoryBuffer``, which is what
mmengine's own checkpoints hold. It works alike on every torch version, whatever the
default of ``weights_only``.

``torch.load(weights_only=True)`` is not enough. It refuses mmengine's checkpoints unless
``builtins.getattr``, ``HistoryBuffer`` and numpy's constructors are made safe globals, and
torch before 2.4 has no such list. With the real ``getattr`` on it, a file can run code, as
a trial with torch 2.12 did: ``getattr`` reaches ``eval`` and the globals of torch's own
rebuilding functions, the pickle puts the one into the other, and a permitted call runs it.
Later versions take a stand-in for ``getattr``; earlier ones would still need this reader.
"""

import _compat_pickle
import collections
import datetime
import math
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.optim.scheduler import param_scheduler
from mmengine.runner import CheckpointLoader

from mmrep.errors import CheckpointError, reason


class _RefusedError(Exception):
    """Names what a checkpoint may not hold."""


def _dtype(spec: str, *_: Any) -> np.dtype:
    """``numpy.dtype`` of numbers and strings.

    Not of objects, nor of records that could hold some: numpy would take bytes of the
    file for pointers to them.
    """
    dtype = np.dtype(spec, False, True)
    if dtype.kind not in 'biufcSU':
        raise _RefusedError(f'numpy.dtype({spec!r})')
    return dtype


def _empty_array(*_: Any) -> np.ndarray:
    """``_reconstruct`` of numpy, for arrays alone; the state fills it."""
    return np.empty(0, np.uint8)


def _encode(text: str, encoding: str) -> bytes:
    """``_codecs.encode`` as pickle writes bytes with it."""
    if encoding != 'latin1':
        raise _RefusedError(f'_codecs.encode to {encoding!r}')
    return text.encode('latin1')


def _method(owner: Any, name: str) -> Any:
    """``getattr`` of the methods that mmengine's checkpoints hold."""
    if (owner, name) not in _METHODS:
        raise _RefusedError(f'builtins.getattr of {name!r}')
    return getattr(owner, name)


_METHODS = [
    *((HistoryBuffer, name) for name in ('min', 'max', 'mean', 'current')),
    *(
        (param_scheduler.OneCycleParamScheduler, f'_annealing_{strategy}')
        for strategy in ('cos', 'linear')
    ),
]

#: What a pickle may call, by the name under which it does.
_CALLED = {
    **{
        f'{known.__module__}.{known.__name__}': known
        for known in (
            *(list, dict, tuple, set, frozenset, slice, range),
            *(int, float, complex, bool, str, bytes, bytearray),
            *(collections.OrderedDict, collections.defaultdict, collections.deque),
            *(collections.Counter, datetime.datetime, datetime.date),
            *(datetime.timedelta, datetime.timezone),
            *(torch._utils._rebuild_tensor, torch._utils._rebuild_tensor_v2),
            *(torch._utils._rebuild_parameter, torch.Size, torch.device),
        )
    },
    # A plain dict serves, and has no attributes that could pass for something else.
    'mmengine.config.config.ConfigDict': dict,
    'builtins.getattr': _method,
    '_codecs.encode': _encode,
    'numpy.dtype': _dtype,
    **{
        f'numpy.{core}.multiarray.{name}': known
        for core in ('core', '_core')
        for name, known in (
            ('_reconstruct', _empty_array),
            # It is elsewhere in every numpy.
            ('scalar', np.float64().__reduce__()[0]),
        )
    },
}

#: What it may only name.
_NAMED = {
    'numpy.ndarray': np.ndarray,
    'torch.storage.UntypedStorage': torch.UntypedStorage,
    **{f'{owner.__module__}.{owner.__name__}': owner for owner, _ in _METHODS},
    **{
        f'{owner.__module__}.{owner.__name__}.{name}': getattr(owner, name)
        for owner, name in _METHODS
    },
    **{
        f'torch.{name}': value
        for name, value in vars(torch).items()
        if isinstance(value, torch.dtype)
    },
}


# In Python rather than C: only here can calls and changes be restricted, too.
class _Unpickler(pickle._Unpickler):
    """Names, calls and changes what a checkpoint needs, and nothing else."""

    dispatch = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        """Look a name up on the two lists."""
        if self.proto < 3:
            # Such a pickle has the names of Python 2.
            module, name = _compat_pickle.NAME_MAPPING.get(
                (module, name), (_compat_pickle.IMPORT_MAPPING.get(module, module), name)
            )
        name = f'{module}.{name}'
        known = _CALLED.get(name, _NAMED.get(name))
        if known is None:
            raise _RefusedError(name)
        return known

    def load_reduce(self) -> None:
        """Call what may be called."""
        function = self.stack[-2]
        if not any(function is known for known in _CALLED.values()):
            raise _RefusedError(f'a call of {_name_of(function)}')
        super().load_reduce()

    def load_newobj(self) -> None:
        """Make a ``HistoryBuffer``; nothing else is made so."""
        arguments, cls = self.stack.pop(), self.stack.pop()
        if cls is not HistoryBuffer or arguments:
            raise _RefusedError(f'an object of {_name_of(cls)}')
        self.append(HistoryBuffer())

    def load_build(self) -> None:
        """Give an object its state, if the state is one that it has itself."""
        state, instance = self.stack.pop(), self.stack[-1]
        kind = type(instance)
        if kind is np.ndarray:
            _check_array_state(state)
            instance.__setstate__(state)
        elif isinstance(instance, np.dtype):
            _check_dtype_state(instance, state)
            instance.__setstate__(state)
        elif kind is collections.OrderedDict and state.keys() <= {'_metadata'}:
            # Of a state dict: the versions of its modules.
            vars(instance).update(state)
        elif kind is HistoryBuffer:
            # Its methods would be set for the class, which has them.
            own = vars(instance).keys() & state.keys()
            vars(instance).update((key, state[key]) for key in own)
        else:
            raise _RefusedError(f'a changed {_name_of(instance)}')

    def load_inst(self) -> None:
        """Make no object of an old-style class."""
        module, name = (self.readline()[:-1].decode('ascii') for _ in range(2))
        raise _RefusedError(f'an object of {module}.{name}')

    def refuse(self) -> None:
        """Make no object in another way."""
        raise _RefusedError('an object of an unusual kind')

    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.INST[0]] = load_inst
    dispatch[pickle.OBJ[0]] = dispatch[pickle.NEWOBJ_EX[0]] = refuse


def _name_of(value: Any) -> str:
    if not hasattr(value, '__qualname__'):
        value = type(value)
    return f'{value.__module__}.{value.__qualname__}'


def _check_dtype_state(dtype: np.dtype, state: tuple) -> None:
    """Check that a state changes nothing but the byte order."""
    order = state[1] if state[1] in ('<', '>') else '='
    if state != dtype.newbyteorder(order).__reduce__()[2]:
        raise _RefusedError(f'a changed numpy.dtype {dtype.name!r}')


def _check_array_state(state: tuple) -> None:
    """Check that the bytes of an array are as many as its shape and dtype say."""
    _, shape, dtype, _, data = state
    if not (
        isinstance(data, bytes)
        and all(size >= 0 for size in shape)
        and len(data) == math.prod(shape) * dtype.itemsize
    ):
        raise _RefusedError(f'a numpy.ndarray of shape {shape} with other contents')


_PICKLE_MODULE = SimpleNamespace(
    # What torch.load looks for in a pickle module.
    Unpickler=_Unpickler,
    load=lambda file, **options: _Unpickler(file, **options).load(),
    __name__='mmrep.checkpoints.reading',
)


def read_checkpoint(path: str | Path, map_location: Any = 'cpu', mmap: bool = True) -> Any:
    """What ``torch.save`` wrote to a file, without running code from it.

    Args:
        path: The file.
        map_location: As ``torch.load``'s. Default: ``'cpu'``.
        mmap: Whether tensors are read only when they are used. The file must then not
            be changed while they are. Default: True.

    Raises:
        CheckpointError: If the file is missing, cut short, no checkpoint, or holds an
            object of a type that is not on the list.
    """
    if '://' in str(path):
        raise CheckpointError(f'checkpoint {path} is an address: download it first')
    path = Path(path).expanduser()
    if path.is_dir():
        raise CheckpointError(f'checkpoint {path} is a folder: give a file in it')
    if not path.is_file():
        raise CheckpointError(f'checkpoint {path} does not exist: check the path')
    try:
        return torch.load(
            # torch 2.1 maps a file by a str alone.
            str(path),
            map_location=map_location,
            pickle_module=_PICKLE_MODULE,
            weights_only=False,
            mmap=_is_zip(path) and mmap,
        )
    except CheckpointError:
        raise
    except _RefusedError as error:
        raise CheckpointError(
            f'{path} holds {error}, which could run code when loaded: save the '
            'checkpoint without it'
        ) from None
    except Exception as error:
        # torch and pickle raise a dozen types for a damaged file.
        raise CheckpointError(
            f'{path} cannot be read as a checkpoint ({reason(error)}): it may be cut short '
            'or of another kind, so copy or download it again'
        ) from error


def _is_zip(path: Path) -> bool:
    """Whether a file has the format of today, and not that of before torch 1.6.

    Asks as ``torch.load`` does, which runs a TorchScript program where it sees one.

    Raises:
        CheckpointError: If it is such a program.
    """
    with open(path, 'rb') as file:
        if file.read(4) != b'PK\x03\x04':
            return False
    if 'constants.pkl' in torch._C.PyTorchFileReader(str(path)).get_all_records():
        raise CheckpointError(
            f'{path} is a TorchScript program, not a checkpoint: give the file that '
            'training wrote'
        )
    return True


def use_safe_reading() -> None:
    """Make mmengine read local checkpoints by :func:`read_checkpoint`.

    On torch>=2.6 mmengine 0.10 cannot read its own checkpoints at all: ``torch.load``
    refuses their ``HistoryBuffer``, so that resuming and testing fail.
    """
    CheckpointLoader.register_scheme(prefixes='', loader=load_from_local, force=True)


def load_from_local(filename: str, map_location: Any = None) -> Any:
    """The loader that :func:`use_safe_reading` registers."""
    # Training goes on with what was read, and may write the file anew.
    checkpoint = read_checkpoint(filename, map_location, mmap=False)
    meta = checkpoint.get('meta') if isinstance(checkpoint, dict) else None
    if isinstance(meta, dict):
        # Runner.resume runs what stands there, in files of mmcv 1, as a config.
        meta.pop('config', None)
    return checkpoint
