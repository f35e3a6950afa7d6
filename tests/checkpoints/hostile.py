"""Files that no training writes: what each is, how to make it, and what is said of it.

Each would once have been read as something else, taken memory or time without end, or ended
in a traceback.
"""

import io
import json
import os
import pickle
import socket
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pickles import legacy_parts, name, opcodes, replace_pickle, write_pickle
from torch import nn

#: A file, from nothing but its path.
Maker = Callable[[Path], Any]

STATE = {'a.weight': torch.arange(24.0).reshape(4, 6), 'a.bias': torch.ones(4)}
CHECKPOINT = {'state_dict': STATE, 'meta': {'CLASSES': ('cat', 'dog'), 'epoch': 3}}

LIST, SET, RANGE = (name('builtins', kind) for kind in ('list', 'set', 'range'))
HISTORY = name('mmengine.logging.history_buffer', 'HistoryBuffer')


def whole() -> bytes:
    """A good checkpoint."""
    buffer = io.BytesIO()
    torch.save(CHECKPOINT, buffer)
    return buffer.getvalue()


def saved(value: Any, legacy: bool = False) -> Maker:
    """What torch writes of a value."""
    return lambda path: torch.save(value, path, _use_new_zipfile_serialization=not legacy)


def pickled(*parts: Any, legacy: bool = False) -> Maker:
    """A checkpoint whose pickle is made of opcodes and values."""
    return lambda path: write_pickle(path, opcodes(*parts), legacy)


def zipped(**options: Any) -> Maker:
    """A good checkpoint, packed in another way."""

    def make(path: Path) -> None:
        with (
            zipfile.ZipFile(io.BytesIO(whole())) as source,
            zipfile.ZipFile(path, 'w', **options) as target,
        ):
            for entry in source.namelist():
                target.writestr(entry, source.read(entry))

    return make


def patched(change: Callable[[bytearray, zipfile.ZipInfo, int], Any]) -> Maker:
    """A good checkpoint whose bytes were changed.

    Args:
        change: Called with the file, the entry of the first storage, and the place of that
            entry in the directory.
    """

    def make(path: Path) -> None:
        data = bytearray(whole())
        entry = zipfile.ZipFile(io.BytesIO(data)).getinfo('archive/data/0')
        at = data.rindex(b'archive/data/0') - 46
        changed = change(data, entry, at)
        path.write_bytes(data if changed is None else changed)

    return make


def put(at: int, layout: str, *values: int) -> Callable[[bytearray, Any, int], None]:
    """Change a field of the directory."""
    return lambda data, entry, place: struct.pack_into(layout, data, place + at, *values)


def put_first(at: int, layout: str, *values: int) -> Callable:
    """Change a field of the header in front of the bytes."""
    return lambda data, entry, place: struct.pack_into(
        layout, data, entry.header_offset + at, *values
    )


def flip_weight(data: bytearray, entry: zipfile.ZipInfo, place: int) -> None:
    length = sum(struct.unpack_from('<2H', data, entry.header_offset + 26))
    data[entry.header_offset + 30 + length] ^= 1


def counted(count: int) -> Callable[[bytearray, Any, int], None]:
    """Say in both ends of an archive how many entries it has."""

    def change(data: bytearray, entry: zipfile.ZipInfo, place: int) -> None:
        struct.pack_into('<2Q', data, len(data) - 98 + 24, count, count)
        struct.pack_into('<2H', data, len(data) - 22 + 8, 0xFFFF, 0xFFFF)

    return change


def before(size: int, is_told: bool) -> Maker:
    """An archive after other bytes, with places that take account of them or do not."""

    def make(path: Path) -> None:
        zipped()(path)
        with zipfile.ZipFile(path) as source:
            entries = {name: source.read(name) for name in source.namelist()}
        packed = io.BytesIO()
        head = b'PK\3\4'.ljust(size)
        packed.write(head if is_told else b'')
        with zipfile.ZipFile(packed, 'w') as target:
            for known, content in entries.items():
                target.writestr(known, content)
        path.write_bytes((b'' if is_told else head) + packed.getvalue())

    return make


def twice(path: Path) -> None:
    zipped()(path)
    with zipfile.ZipFile(path, 'a') as file, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        file.writestr('archive/data/0', bytes(96))


def overlapping(data: bytearray, entry: zipfile.ZipInfo, place: int) -> None:
    """The first storage is in the padding of the one before the second."""
    other = zipfile.ZipFile(io.BytesIO(data)).getinfo('archive/data/1')
    inner = data[entry.header_offset : entry.header_offset + 30 + 14]
    struct.pack_into('<H', inner, 28, 0)
    end = zipfile.ZipFile(io.BytesIO(data)).getinfo('archive/version').header_offset
    start = other.header_offset + 30 + 14 + 4
    assert start + len(inner) < end
    data[start : start + len(inner)] = inner
    struct.pack_into('<L', data, place + 42, start)


FLOATS = name('torch', 'FloatStorage')
REBUILD = name('torch._utils', '_rebuild_tensor_v2')
REBUILD_3 = name('torch._utils', '_rebuild_tensor_v3')
DEQUE = name('collections', 'deque')
NAMESPACE = name('argparse', 'Namespace')
RECONSTRUCT = name('numpy.core.multiarray', '_reconstruct')
NONES = pickle.MARK + pickle.NONE * 300_000
MEGABYTE = pickle.BINBYTES + struct.pack('<L', 10**6) + bytes(10**6)
MAGIC = torch.serialization.MAGIC_NUMBER


def tensor(
    size: tuple,
    stride: tuple,
    offset: int = 0,
    numel: int = 24,
    key: str = '0',
    floats: bytes = FLOATS,
    hooks: dict | None = None,
    more: tuple = (),
) -> list:
    """The opcodes of a tensor."""
    reference = ('storage', floats, key, 'cpu', numel)
    return [
        *(REBUILD, pickle.MARK, *tupled(reference), pickle.BINPERSID),
        *(offset, size, stride, False, hooks or {}, *more, pickle.TUPLE, pickle.REDUCE),
    ]


def packed(dtype: bytes) -> list:
    """The opcodes of a state of a tensor of one of the newer dtypes."""
    untyped = name('torch.storage', 'UntypedStorage')
    reference = opcodes(*tupled(('storage', untyped, '0', 'cpu', 96)), pickle.BINPERSID)
    tensor = call(REBUILD_3, reference[2:-1], 0, (96,), (1,), False, {}, dtype)
    return [pickle.EMPTY_DICT, 'w', *tensor, pickle.SETITEM]


def parameter(data: Any, hooks: dict | None = None) -> list:
    """The opcodes of a parameter."""
    return call(name('torch._utils', '_rebuild_parameter'), data, False, hooks or {})


def with_reference(*reference: Any) -> Maker:
    """A checkpoint that refers to something as to a storage."""
    return with_pickle(opcodes(*tupled(reference), pickle.BINPERSID))


def with_pickle(data: bytes) -> Maker:
    """A checkpoint of two storages with another pickle."""

    def make(path: Path) -> None:
        torch.save(STATE, path)
        replace_pickle(path, data)

    return make


def with_entry(entry: str, content: bytes) -> Maker:
    """A checkpoint with another entry."""

    def make(path: Path) -> None:
        with (
            zipfile.ZipFile(io.BytesIO(whole())) as source,
            zipfile.ZipFile(path, 'w') as target,
        ):
            for known in source.namelist():
                changed = known == f'archive/{entry}'
                target.writestr(known, content if changed else source.read(known))

    return make


def again(times: int, function: bytes, *argument: Any, more: bytes = b'') -> Maker:
    """A checkpoint that calls a function with one argument many times, for nothing."""
    kept = (function, b'q\x20', pickle.POP, *argument, b'q\x21', pickle.POP)
    return pickled(*kept, (b'h\x20h\x21' + more + b'R0') * times, None)


def tupled(values: tuple) -> list:
    return [pickle.MARK, *values, pickle.TUPLE]


def with_tensor(*shape: Any, **options: Any) -> Maker:
    """A checkpoint with one storage of 24 numbers and one tensor in it."""
    data = opcodes('a', *tensor(*shape, **options))
    # The dict around the tensor and its name.
    data = data[:2] + pickle.EMPTY_DICT + data[2:-1] + pickle.SETITEM + pickle.STOP

    return with_pickle(data)


def doubled(times: int, kind: bytes = pickle.TUPLE2, leaf: Any = ()) -> list:
    """Each the pair of the one before and itself."""
    pair = [pickle.DUP, pickle.TUPLE2]
    if kind == pickle.APPENDS:
        # [x, x]: a list, and what was made before goes into it.
        pair = [
            pickle.BINPUT + b'\x01',
            *(pickle.POP, pickle.EMPTY_LIST, pickle.MARK),
            *(pickle.BINGET + b'\x01', pickle.BINGET + b'\x01', pickle.APPENDS),
        ]
    return [leaf, *(times * pair)]


def in_meta(*parts: Any) -> list:
    """The opcodes of a value as the classes of a checkpoint."""
    return [
        *(pickle.EMPTY_DICT, 'state_dict', pickle.EMPTY_DICT, pickle.SETITEM),
        *('meta', pickle.EMPTY_DICT, 'CLASSES', *parts),
        *(pickle.SETITEM, pickle.SETITEM),
    ]


def call(function: bytes, *arguments: Any) -> list:
    return [function, pickle.MARK, *arguments, pickle.TUPLE, pickle.REDUCE]


def array(state: tuple) -> list:
    return [opcodes(np.zeros(0))[2:-1], state, pickle.BUILD]


def buffer(data: Any, dtype: str, shape: tuple, order: str = 'C') -> list:
    """The opcodes of an array as protocol 5 writes it."""
    if type(data) is bytes:
        data = pickle.BINBYTES + struct.pack('<L', len(data)) + data
    return call(
        name('numpy.core.numeric', '_frombuffer'), data, of_dtype(dtype), shape, order
    )


def of_dtype(text: str) -> bytes:
    return opcodes(name('numpy', 'dtype'), (text, False, True), pickle.REDUCE)[2:-1]


def safetensors(header: Any, data: bytes = b'', length: int | None = None) -> Maker:
    """A file of safetensors with such a header."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(header) if length is None else length
    return lambda path: path.with_suffix('.safetensors').write_bytes(
        struct.pack('<Q', size) + header + data
    )


def table_of(count: int) -> Maker:
    """A file of safetensors with so many tensors and no numbers."""
    return lambda path: safetensors(
        {f'{i:x}': entry('F32', [0], 0, 0) for i in range(count)}
    )(path)


def entry(dtype: str, shape: list, start: int, end: int) -> dict:
    return {'dtype': dtype, 'shape': shape, 'data_offsets': [start, end]}


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        # The paths of sockets are short.
        here = Path.cwd()
        os.chdir(path.parent)
        server.bind(path.name)
        os.chdir(here)


def legacy_part(*part: Any) -> Maker:
    """A file of before torch 1.6 with a part of a storage of four numbers."""
    reference = ['storage', FLOATS, '0', 'cpu', 4, pickle.MARK, *part, pickle.TUPLE]
    parts = legacy_parts(opcodes(*tupled(tuple(reference)), pickle.BINPERSID))
    return lambda path: path.write_bytes(b''.join(parts) + bytes(99))


def legacy_keys(*keys: Any) -> Maker:
    """A file of before torch 1.6 with such names of storages."""
    parts = [*legacy_parts(opcodes(1))[:-1], opcodes(*keys)]
    return lambda path: path.write_bytes(b''.join(parts))


def legacy_start(*values: Any) -> Maker:
    """A file of before torch 1.6 that begins with other values."""
    parts = [pickle.dumps(value, 2) for value in values]
    rest = legacy_parts(opcodes(1))[len(parts) :]
    return lambda path: path.write_bytes(b''.join([*parts, *rest]))


def legacy_storages(*numels: int, declared: int = 4, keys: Any = ('0',)) -> Maker:
    """A file of before torch 1.6 with one storage, which is said to be otherwise."""
    reference = tupled(('storage', FLOATS, '0', 'cpu', declared, None))
    value = opcodes(
        name('torch._utils', '_rebuild_tensor_v2'),
        *(pickle.MARK, *reference, pickle.BINPERSID),
        *(0, (declared,), (1,), False, {}, pickle.TUPLE, pickle.REDUCE),
    )
    parts = [*legacy_parts(value)[:-1], pickle.dumps(list(keys), 2)]
    parts += [struct.pack('<q', numel) + bytes(16) for numel in numels]
    return lambda path: path.write_bytes(b''.join(parts))


DEEP = [pickle.EMPTY_LIST * 900, pickle.APPEND * 899]
CYCLE = [
    *(pickle.EMPTY_LIST, pickle.BINPUT + b'\x01'),
    *(pickle.BINGET + b'\x01', pickle.APPEND),
]
HUGE = b'\x8a\xff' + b'\x7f' * 255
CPU_TENSOR = torch.ones(2)

CHANGED = 'it may be cut short'
MORE = 'which no training writes'
UNJUSTIFIED = 'more values than its size'
CODE = 'could run code'


def quantized() -> torch.Tensor:
    return torch.quantize_per_tensor(CPU_TENSOR, 0.1, 0, torch.qint8)


def csr(path: Path) -> None:
    with warnings.catch_warnings():
        # It is in beta state, says torch.
        warnings.simplefilter('ignore')
        torch.save({'w': torch.eye(2).to_sparse_csr()}, path)


def with_attribute() -> nn.Parameter:
    parameter = nn.Parameter(torch.ones(2))
    parameter.scale = 2
    return parameter


def forged_history(logs: Any, counts: Any) -> list:
    state = {'_log_history': logs, '_count_history': counts}
    return [HISTORY, (), pickle.NEWOBJ, state, pickle.BUILD]


#: The name of a file, how it is made, and a part of what is said of it.
HOSTILE: list[tuple[str, Maker, str]] = [
    # The archive.
    (
        'compressed',
        zipped(compression=zipfile.ZIP_DEFLATED),
        'that is compressed: give the file that torch wrote',
    ),
    (
        'bzip2',
        zipped(compression=zipfile.ZIP_BZIP2),
        'that is compressed: give the file that torch wrote',
    ),
    ('flipped weight', patched(flip_weight), 'not match its checksum'),
    ('other checksum', patched(put(16, '<L', 1)), 'not match its checksum'),
    ('encrypted', patched(put(8, '<H', 0x809)), 'is encrypted'),
    ('unknown flag', patched(put(8, '<H', 0x828)), 'has unknown flags'),
    (
        'said deflated',
        patched(put(10, '<H', 8)),
        'that is compressed: give the file that torch wrote',
    ),
    ('header deflated', patched(put_first(8, '<H', 8)), 'differs from its directory'),
    ('header renamed', patched(put_first(30, '<c', b'b')), 'differs from its directory'),
    ('header resized', patched(put_first(18, '<L', 5)), 'differs from its directory'),
    ('header checksum', patched(put_first(14, '<L', 5)), 'differs from its directory'),
    ('no header', patched(put_first(0, '<L', 5)), 'differs from its directory'),
    ('two sizes', patched(put(20, '<L', 5)), 'has two sizes'),
    ('too large', patched(put(20, '<2L', 1 << 30, 1 << 30)), 'overlaps'),
    ('larger', patched(put(20, '<2L', 160, 160)), 'overlaps'),
    ('smaller', patched(put(20, '<2L', 92, 92)), 'does not have the bytes'),
    ('out of bounds', patched(put(42, '<L', 1 << 30)), 'differs from its directory'),
    ('into another', patched(put(42, '<L', 0)), 'differs from its directory'),
    ('overlapping', patched(overlapping), 'overlaps'),
    ('twice', twice, "two entries 'archive/data/0'"),
    ('name twice', patched(put(46, '<14s', b'archive/data/1')), 'differs from'),
    ('something before', patched(lambda data, *_: b'PK\3\4' + data), CHANGED),
    ('something after', patched(lambda data, *_: data + b'more'), 'no end'),
    ('a comment', patched(lambda data, *_: data[:-2] + b'\4\0more'), 'no end'),
    ('no directory', patched(lambda data, *_: data[:-98]), 'no end'),
    ('count', patched(lambda data, *_: data[:-12] + b'\1\0' + data[-10:]), CHANGED),
    ('two ends', patched(lambda data, *_: data[:-6] + bytes(4) + data[-2:]), 'two end'),
    ('many entries', patched(counted(1 << 20)), 'an archive of 1048576 entries'),
    ('an entry more', patched(counted(9)), 'the directory of its archive is broken'),
    ('an entry less', patched(counted(5)), 'the directory of its archive is broken'),
    ('something before a small one', before(8, True), 'something stands before'),
    ('moved', before(8, False), 'not where its end record'),
    ('no pickle', lambda path: zipfile.ZipFile(path, 'w').close(), CHANGED),
    (
        'two folders',
        lambda path: (zipped()(path), zipfile.ZipFile(path, 'a').writestr('b/data/0', b'')),
        'one folder with a data.pkl',
    ),
    # Tensors.
    ('expanded', with_tensor((10**6, 10**6), (0, 0)), MORE),
    ('expanded a little too much', with_tensor((10**5, 10**3), (0, 0)), MORE),
    ('too long', with_tensor((25,), (1,)), 'its storage of 24 numbers'),
    ('strides too wide', with_tensor((4, 6), (7, 1)), 'its storage of 24 numbers'),
    ('too far', with_tensor((4,), (1,), 21), 'its storage of 24 numbers'),
    ('negative stride', with_tensor((4,), (-1,), 3), 'impossible shape'),
    ('negative size', with_tensor((-4,), (1,)), 'impossible shape'),
    ('negative offset', with_tensor((4,), (1,), -4), 'impossible shape'),
    ('size of 20 digits', with_tensor((10**19,), (1,)), 'impossible shape'),
    ('no strides', with_tensor((4,), ()), 'impossible shape'),
    ('size of text', with_tensor(('4',), (1,)), 'impossible shape'),
    ('a million axes', with_tensor((1,) * 10**5, (1,) * 10**5), CHANGED),
    ('no storage', with_tensor((4,), (1,), key='7'), 'does not have the bytes'),
    ('storage elsewhere', with_tensor((4,), (1,), key='../version'), CHANGED),
    ('larger storage', with_tensor((4,), (1,), numel=25), 'does not have the bytes'),
    ('storage of 20 digits', with_tensor((4,), (1,), numel=10**19), CHANGED),
    ('negative storage', with_tensor((4,), (1,), numel=-24), 'does not describe'),
    (
        'storage of 2^40 names',
        with_reference('storage', FLOATS, *doubled(40), 'cpu', 24),
        'does not describe',
    ),
    (
        'storage in 2^40 places',
        with_reference('storage', FLOATS, '0', *doubled(40), 24),
        'does not describe',
    ),
    ('storage of no numbers', with_reference('storage', 5, '0', 'cpu', 24), 'not describe'),
    ('module', with_reference('module', 5, '0', 'cpu'), 'a reference to something other'),
    ('legacy part of 2^40 names', legacy_part(*doubled(40), 0, 2), 'does not describe'),
    ('legacy part outside', legacy_part('part', 2, 3), 'a view of a storage'),
    (
        'legacy storages of 2^40 names',
        legacy_keys(pickle.MARK, *doubled(40), *doubled(40), pickle.LIST),
        'storages are not those',
    ),
    ('legacy of another kind', legacy_start(5), 'does not begin like one'),
    ('legacy of another version', legacy_start(MAGIC, 5), 'does not begin like one'),
    ('no tensor in a parameter', pickled(*parameter(5)), 'a parameter has no tensor'),
    ('hooks', pickled(*parameter(5, hooks={1: 2})), 'a parameter with hooks'),
    ('hooks of a tensor', with_tensor((4,), (1,), hooks={1: 2}), 'a tensor with hooks'),
    ('properties', with_tensor((4,), (1,), more=({'a': True},)), 'with unknown metadata'),
    (
        'numbers in no storage',
        pickled(*call(REBUILD, 5, 0, (1,), (1,), False, {})),
        CHANGED,
    ),
    (
        'numbers of a class',
        pickled(*call(REBUILD_3, 5, 0, (1,), (1,), False, {}, 5)),
        'a tensor has no storage',
    ),
    (
        'forged quantized',
        with_tensor((4,), (1,), floats=name('torch', 'QInt32Storage')),
        'holds a tensor of torch.qint32 (a): dequantize it',
    ),
    (
        'order of bytes',
        with_entry('byteorder', b'middle'),
        "byte order is 'middle'",
    ),
    ('legacy storage cut', legacy_storages(4, declared=1000), CHANGED),
    ('legacy storage of other size', legacy_storages(3), 'not as long'),
    ('legacy storage huge', legacy_storages(1 << 40, declared=1 << 40), 'bytes of tensors'),
    ('legacy storage missing', legacy_storages(keys=()), 'storages are not those'),
    ('legacy storage unknown', legacy_storages(4, keys=('1',)), 'storages are not those'),
    # Kinds of tensors.
    ('sparse', saved({'w': torch.eye(2).to_sparse()}), 'holds a sparse tensor (w): make'),
    ('csr', csr, 'holds a sparse tensor (w): make'),
    *(
        (
            f'packed {kind}',
            with_pickle(opcodes(*packed(name('torch', kind)))),
            f'holds a tensor of torch.{kind} (w): dequantize it',
        )
        for kind in ('float4_e2m1fn_x2', 'uint4', 'int3')
        if hasattr(torch, kind)
    ),
    ('quantized', saved({'w': quantized()}), 'holds a quantized tensor (w): dequantize'),
    ('quantized, legacy', saved({'w': quantized()}, True), 'a quantized tensor (w): deq'),
    (
        'deeper quantized',
        saved({'state_dict': {'w': nn.Parameter(quantized(), False)}}),
        'holds a quantized tensor (state_dict.w)',
    ),
    ('meta', saved({'w': torch.ones(2, device='meta')}), 'without values, on the meta'),
    ('attributes', saved({'w': with_attribute()}), 'holds a parameter with attributes'),
    ('bare storage', saved({'w': torch.ones(2).untyped_storage()}), 'a bare storage (w)'),
    (
        'in pieces',
        pickled(name('torch.distributed.tensor', 'DTensor')),
        'holds a distributed tensor (torch.distributed.tensor.DTensor)',
    ),
    (
        'bfloat16 of numpy',
        pickled(name('ml_dtypes', 'bfloat16')),
        'that numpy does not have (ml_dtypes.bfloat16): save it as float32',
    ),
    # Work without end.
    ('2^30 lists', pickled(*in_meta(*doubled(30, pickle.APPENDS, []))), MORE),
    ('2^200 lists', pickled(*in_meta(*doubled(200, pickle.APPENDS, []))), MORE),
    ('2^30 tuples', pickled(*in_meta(*doubled(30))), MORE),
    ('2^30 tuples, legacy', pickled(*in_meta(*doubled(30)), legacy=True), MORE),
    ('900 levels', pickled(*in_meta(*DEEP)), 'more than 100 levels deep'),
    ('itself', pickled(*in_meta(*CYCLE)), 'more than 100 levels deep'),
    ('key of 2^40', pickled(pickle.EMPTY_DICT, *doubled(40), 1, pickle.SETITEM), MORE),
    ('keys of 2^40', pickled(pickle.MARK, *doubled(40), 1, pickle.DICT), MORE),
    (
        'set of 2^40',
        pickled(*call(SET, pickle.EMPTY_LIST, *doubled(40), pickle.APPEND)),
        MORE,
    ),
    (
        'set of 2^40, added',
        pickled(b'\x8f', pickle.MARK, *doubled(40), pickle.ADDITEMS),
        MORE,
    ),
    (
        'frozen set of 2^40',
        pickled(pickle.MARK, *doubled(40), pickle.FROZENSET),
        MORE,
    ),
    (
        'deques of 2^40',
        pickled(
            *call(
                name('collections', 'OrderedDict'),
                *(pickle.EMPTY_LIST, *call(DEQUE, ()), pickle.MARK, *doubled(40), 1),
                *(pickle.APPENDS, pickle.APPEND),
            )
        ),
        MORE,
    ),
    (
        'defaults of 2^40',
        pickled(
            *call(
                *(name('collections', 'defaultdict'), LIST),
                *(pickle.EMPTY_LIST, *doubled(40), 1, pickle.TUPLE2, pickle.APPEND),
            )
        ),
        CODE,
    ),
    (
        'pairs of 2^40',
        pickled(
            *call(
                name('collections', 'OrderedDict'),
                *(pickle.EMPTY_LIST, *doubled(40), 1, pickle.TUPLE2, pickle.APPEND),
            )
        ),
        MORE,
    ),
    (
        'keys of one hash',
        lambda path: saved({(2**61 - 1) * i: None for i in range(1, 4000)})(path),
        MORE,
    ),
    (
        'a name of 2^30 lists',
        pickled(
            *call(name('builtins', 'getattr'), HISTORY, *doubled(30, pickle.APPENDS, []))
        ),
        CODE,
    ),
    (
        'a dtype of 2^30 lists',
        pickled(*call(name('numpy', 'dtype'), *doubled(30, pickle.APPENDS, []))),
        CODE,
    ),
    (
        'million deques',
        pickled(
            *(name('collections', 'deque'), pickle.BINPUT + b'\1', ((),), b'q\2'),
            b'h\1h\2R' * 1_000_000,
        ),
        UNJUSTIFIED,
    ),
    ('calls with a range', pickled(RECONSTRUCT, *call(RANGE, 0, 10**8, 1), b'R'), CHANGED),
    (
        'a pair of pairs that is counted',
        pickled(*call(name('collections', 'Counter')), 5, *doubled(40), b's'),
        CODE,
    ),
    (
        'text in punycode',
        pickled(
            *call(
                name('builtins', 'bytearray'),
                *(
                    ''.join(chr(0x4E00 + n * 7919 % 20000) for n in range(60000)),
                    'punycode',
                ),
            )
        ),
        MORE,
    ),
    ('calls with bytes', again(150_000, RECONSTRUCT, MEGABYTE), CHANGED),
    ('calls with a tuple', again(100_000, RECONSTRUCT, NONES + b't'), UNJUSTIFIED),
    (
        'deques of the last',
        again(100_000, DEQUE, NONES + b'l', more=b'K\1\x86'),
        UNJUSTIFIED,
    ),
    ('sets of the same', again(100_000, SET, NONES + b'l', more=b'\x85'), UNJUSTIFIED),
    (
        'range of long numbers',
        pickled(*call(RANGE, 0, (1 << 16_000_000) + 1, (1 << 8_000_000) + 3)),
        MORE,
    ),
    (
        'one text',
        pickled('\u00e9' * 500_000, b'q\1', pickle.MARK, b'h\1' * 400_000, b'l'),
        'more than 500000 values',
    ),
    (
        'one text of numpy',
        pickled(
            *array((1, (1,), np.dtype('<U250000'), False, b'a\0\0\0' * 250_000)),
            *(b'q\1', pickle.MARK, b'h\1' * 400_000, b'l'),
        ),
        'more than 500000 values',
    ),
    *(
        (
            f'numbers of numpy of 1 MB, {dtype}',
            again(
                100_000,
                name('numpy.core.multiarray', 'scalar'),
                *(pickle.MARK, of_dtype(dtype), MEGABYTE, b't'),
            ),
            UNJUSTIFIED,
        )
        for dtype in ('S1000000', 'U250000')
    ),
    ('range', pickled(*in_meta(*call(RANGE, 0, 10**10, 1))), MORE),
    ('list of range', pickled(*call(LIST, *call(RANGE, 0, 10**10, 1))), MORE),
    ('set of range', pickled(*call(SET, *call(RANGE, 0, 10**10, 1))), MORE),
    ('bytes', pickled(*call(name('builtins', 'bytes'), 10**12)), MORE),
    ('bytearray', pickled(*call(name('builtins', 'bytearray'), 10**12)), MORE),
    ('bytearray said', pickled(pickle.BYTEARRAY8 + struct.pack('<Q', 10**12)), CHANGED),
    ('bytes said', pickled(pickle.BINBYTES8 + struct.pack('<Q', 10**12)), CHANGED),
    ('text said', pickled(pickle.BINUNICODE8 + struct.pack('<Q', 10**12)), CHANGED),
    ('number said', pickled(pickle.LONG4 + struct.pack('<L', 2**31 - 1)), CHANGED),
    ('frame said', pickled(pickle.FRAME + struct.pack('<Q', 10**12)), CHANGED),
    (
        'bytes said, legacy',
        pickled(pickle.BINBYTES8 + struct.pack('<Q', 10**12), legacy=True),
        CHANGED,
    ),
    (
        'copies',
        lambda path: write_pickle(
            path,
            opcodes(name('_codecs', 'encode'), b'', ('x' * 10**6, 'latin1'))[:-1]
            + pickle.BINPUT
            + b'\x02'
            + pickle.POP
            + pickle.BINPUT
            + b'\x01'
            + (pickle.BINGET + b'\x01' + pickle.BINGET + b'\x02' + pickle.REDUCE) * 10**4
            + pickle.STOP,
            False,
        ),
        UNJUSTIFIED,
    ),
    ('number of 2040 bits', pickled(*in_meta(HUGE)), 'a number of'),
    ('5000 digits', pickled(pickle.INT + b'9' * 5000 + b'\n'), CHANGED),
    ('endless line', pickled(pickle.INT + b'9' * 10**6 + b'\n'), 'within a line'),
    (
        'numpy text of 2 GB',
        pickled(
            *call(name('numpy._core.multiarray', 'scalar'), of_dtype('S2000000000'), None)
        ),
        CHANGED,
    ),
    (
        'half a number of numpy',
        pickled(
            *(name('numpy._core.multiarray', 'scalar'), pickle.MARK),
            *(of_dtype('f8'), name('_codecs', 'encode'), ('abcd', 'latin1')),
            *(pickle.REDUCE, pickle.TUPLE, pickle.REDUCE),
        ),
        'a numpy scalar of 4 bytes',
    ),
    (
        'array of nothing',
        pickled(*in_meta(*array((1, (1 << 40,), np.dtype('S0'), False, b'')))),
        CHANGED,
    ),
    ('large array', saved({'a': np.zeros(1_000_000, 'u1')}), 'more than 500000 values'),
    (
        'no characters',
        pickled(*array((1, (1,), np.dtype('<U1'), False, b'\xff' * 4))),
        CHANGED,
    ),
    ('half a character', saved({'meta': '\ud800'}), 'meta is not Unicode text'),
    ('half a character as key', saved({'\ud800': 1}), 'not Unicode text'),
    (
        'versions that are no table',
        pickled(
            *call(name('collections', 'OrderedDict')), {'_metadata': [1]}, pickle.BUILD
        ),
        'not a dict of dicts',
    ),
    ('histories', pickled(*forged_history([1], [1, 2])), 'not a history of numbers'),
    ('a long name', saved({'a' * 5000: torch.ones(1)}), MORE),
    ('a name of two lines', saved({'a\nb': torch.ones(1)}), MORE),
    (
        'a command line that goes on and on',
        pickled(
            *(dict.fromkeys(range(100_000)), b'q\x20', pickle.POP, pickle.EMPTY_DICT),
            b'h\x20b' * 100_000,
        ),
        UNJUSTIFIED,
    ),
    (
        'a tensor of a class of its own',
        pickled(
            *call(
                name('torch._tensor', '_rebuild_from_type_v2'),
                *(name('builtins', 'bool'), name('builtins', 'dict'), (), {'a': 1}),
            )
        ),
        'a tensor with attributes or of a class of its own',
    ),
    ('a changed class of command lines', pickled(NAMESPACE, {'a': 1}, pickle.BUILD), CODE),
    ('a command line with arguments', pickled(NAMESPACE, ((1,),), pickle.NEWOBJ), CODE),
    ('an array of more than its bytes', pickled(*buffer(b'12345678', 'f8', (2,))), CHANGED),
    ('an array in no order', pickled(*buffer(b'12345678', 'f8', (1,), 'x')), CHANGED),
    ('an array of a text', pickled(*buffer('12345678', 'f8', (1,))), CHANGED),
    (
        'changed array',
        pickled(opcodes(np.zeros(1))[2:-1], 0, 1.0, pickle.SETITEM),
        'holds a changed numpy.ndarray',
    ),
    (
        'maker of defaults',
        pickled(*call(name('collections', 'defaultdict'), name('_codecs', 'encode'))),
        CODE,
    ),
    # Files of safetensors.
    ('safetensors: empty', safetensors(b'', length=0), CHANGED),
    ('safetensors: header said', safetensors({}, length=10**12), CHANGED),
    ('safetensors: no JSON', safetensors(b'{"a":'), CHANGED),
    ('safetensors: levels', safetensors(b'{"a":' * 50_000 + b'}' * 50_000), CHANGED),
    ('safetensors: out of bounds', safetensors({'a': entry('F32', [2], 0, 8)}), CHANGED),
    (
        'safetensors: backwards',
        safetensors({'a': entry('F32', [2], 8, 0)}, bytes(8)),
        CHANGED,
    ),
    (
        'safetensors: overlapping',
        safetensors({k: entry('F32', [2], 0, 8) for k in 'ab'}, bytes(8)),
        CHANGED,
    ),
    (
        'safetensors: a gap',
        safetensors({'a': entry('F32', [1], 4, 8)}, bytes(8)),
        CHANGED,
    ),
    (
        'safetensors: shape',
        safetensors({'a': entry('F32', [2**62, 4], 0, 8)}, bytes(8)),
        CHANGED,
    ),
    ('safetensors: dtype', safetensors({'a': entry('F31', [2], 0, 8)}, bytes(8)), CHANGED),
    (
        'safetensors: levels of meta',
        safetensors({'__metadata__': {'meta': '{"a":' * 300 + '1' + '}' * 300}}),
        'levels deep',
    ),
    ('safetensors: a table of 11 MB', table_of(190_000), 'a table of 1'),
    ('safetensors: many tensors of nothing', table_of(90_000), 'holds 90000 tensors'),
    (
        'safetensors: a meta of 7 MB',
        lambda path: safetensors(
            {'__metadata__': {'meta': '{"a": [%s0]}' % ('{},' * 2_300_000)}}
        )(path),
        'a meta of 6900010 characters',
    ),
    *(
        (
            f'safetensors: {kind}',
            safetensors({'w': entry(said, [4], 0, 2)}, bytes(2)),
            f'a tensor of torch.{kind} (state_dict.w): dequantize it',
        )
        for kind, said in {'float4_e2m1fn_x2': 'F4'}.items()
        if hasattr(torch, kind)
    ),
    # What is no file.
    ('pipe', os.mkfifo, 'is a pipe, socket or device'),
    ('socket', a_socket, 'is a pipe, socket or device'),
    ('device', lambda path: path.symlink_to('/dev/zero'), 'is a pipe, socket or device'),
    ('terminal', lambda path: path.symlink_to('/dev/tty'), 'is a pipe, socket or device'),
    ('memory', lambda path: path.symlink_to('/proc/self/mem'), 'it is empty'),
    ('link to itself', lambda path: path.symlink_to(path), 'cannot be opened'),
    ('link to nothing', lambda path: path.symlink_to('nothing'), 'does not exist'),
    ('hole of 1 TB', lambda path: (path.touch(), os.truncate(path, 1 << 40)), CHANGED),
    ('tar', lambda path: path.write_bytes(bytes(257) + b'ustar' + bytes(9)), '0.1.10'),
]
