import argparse
import collections
import copyreg
import datetime
import functools
import io
import json
import operator
import os
import pickle
import subprocess
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader
from pickles import Call, legacy_parts, name, opcodes, replace_pickle, write_pickle
from safetensors.torch import load_file, save_file
from tiny_runner import tiny_runner
from torch import nn

from mmrep.checkpoints import read_checkpoint
from mmrep.errors import CheckpointError

LEGACY = pytest.mark.parametrize('legacy', [False, True], ids=['zip', 'legacy'])


def save(value, path: Path, legacy: bool = False) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    return path


class TestContents:
    """What checkpoints hold is read as it was."""

    @LEGACY
    def test_run_of_mmengine(self, run_checkpoint, tmp_path, legacy):
        whole = torch.load(run_checkpoint, weights_only=False)
        read = read_checkpoint(save(whole, tmp_path / 'run.pth', legacy))
        assert (
            read.keys() == whole.keys() >= {'optimizer', 'param_schedulers', 'message_hub'}
        )
        for key, tensor in whole['state_dict'].items():
            assert torch.equal(read['state_dict'][key], tensor)
        assert read['state_dict']._metadata == whole['state_dict']._metadata
        first = read['optimizer']['state'][0]['exp_avg']
        assert torch.equal(first, whole['optimizer']['state'][0]['exp_avg'])
        assert read['meta'] == whole['meta']
        cycle = read['param_schedulers'][1]
        assert cycle['anneal_func'](1, 3, 0.5) == pytest.approx(2)
        logs = whole['message_hub']['log_scalars']
        for key, buffer in read['message_hub']['log_scalars'].items():
            assert isinstance(buffer, HistoryBuffer)
            assert buffer.data[0].tolist() == logs[key].data[0].tolist()
            assert buffer.statistics('mean') == logs[key].mean()
        assert read['message_hub']['runtime_info'] == whole['message_hub']['runtime_info']

    @LEGACY
    @pytest.mark.parametrize(
        'array',
        [
            np.linspace(0, 1, 6).reshape(2, 3),
            np.asfortranarray(np.arange(6, dtype='i4').reshape(2, 3)),
            np.arange(5, dtype='>f8'),
            np.array(['a', 'word']),
            np.array([b'a', b'word']),
            np.array([True, False]),
            np.array(1 + 2j),
            np.zeros((0, 3), 'f2'),
            np.float64(1.5),
            np.float32(0.1),
            np.int64(-3),
            np.uint8(200),
            np.bool_(True),
            np.str_('word'),
        ],
        ids=lambda array: f'{array.dtype.str}-{array.shape}',
    )
    def test_numpy(self, tmp_path, array, legacy):
        # Twice: the second one refers to the first one's dtype.
        written = [array, array.copy()]
        expected = pickle.loads(pickle.dumps(array))
        for read in read_checkpoint(save(written, tmp_path / 'a.pth', legacy)):
            assert type(read) is type(array)
            assert read.dtype == expected.dtype
            assert read.shape == array.shape
            assert read.tolist() == array.tolist()

    def test_shared_dtypes_stay_as_they_are(self, tmp_path):
        read_checkpoint(save([np.arange(5, dtype='>f8')], tmp_path / 'a.pth'))
        assert np.dtype('f8').isnative
        assert np.arange(2.0).tobytes() == np.array([0, 1], '<f8').tobytes()

    @LEGACY
    @pytest.mark.parametrize(
        'value',
        [
            [1, 2.5, None, True, 'text', b'\x00\xff', bytearray(b'\xff'), 1 + 2j],
            {'a': (1, 2), 3: [4], 'set': {1}, 'frozen': frozenset({2})},
            collections.OrderedDict(a=1),
            collections.defaultdict(list, {1: [2]}),
            collections.deque([1, 2], maxlen=2),
            collections.deque([[1, 2]]),
            collections.deque(),
            collections.defaultdict(collections.OrderedDict),
            collections.Counter('abb'),
            [slice(1, 2), range(3), b'', bytearray()],
            [datetime.datetime(2026, 1, 2, 3), datetime.timedelta(4)],
            [datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc)],
            [torch.float16, torch.bool, torch.Size([1, 2]), torch.device('cpu')],
            float('inf'),
            2**100,
        ],
        ids=str,
    )
    def test_plain_values(self, tmp_path, value, legacy):
        read = read_checkpoint(save(value, tmp_path / 'a.pth', legacy))
        assert type(read) is type(value)
        assert read == value

    @LEGACY
    @pytest.mark.parametrize('mmap', [True, False])
    def test_tensors(self, tmp_path, legacy, mmap):
        base = torch.arange(12.0).reshape(3, 4)
        written = {
            'dense': base,
            'view': base.t()[1:],
            'parameter': nn.Parameter(base.clone(), requires_grad=False),
            'empty': torch.zeros(0, 2),
            'scalar': torch.tensor(3, dtype=torch.int64),
            'bool': torch.tensor([True, False]),
            'half': torch.ones(2, dtype=torch.bfloat16),
            'complex': torch.ones(2, dtype=torch.complex64),
        }
        path = save(written, tmp_path / 'a.pth', legacy)
        read = read_checkpoint(str(path), mmap=mmap)
        for key, tensor in written.items():
            assert torch.equal(read[key], tensor)
            assert read[key].dtype == tensor.dtype
        assert isinstance(read['parameter'], nn.Parameter)
        assert not read['parameter'].requires_grad
        read['dense'][0, 1] = -1
        assert read['view'][0, 0] == -1, 'a view shares its memory'
        again = read_checkpoint(path)
        assert torch.equal(again['dense'], base), 'the file is not written to'

    def test_config_dict_becomes_a_dict(self, tmp_path):
        read = read_checkpoint(save(ConfigDict(a=dict(b=1)), tmp_path / 'a.pth'))
        assert type(read) is type(read['a']) is dict
        assert read == dict(a=dict(b=1))

    @pytest.mark.parametrize('protocol', [2, 3, 4])
    def test_protocols(self, tmp_path, protocol):
        written = [{1}, frozenset({2}), np.dtype('f4'), range(2), np.float64(3)]
        written += [bytearray(b'a'), HistoryBuffer([1], [1])]
        torch.save(written, tmp_path / 'a.pth', pickle_protocol=protocol)
        *plain, buffer = read_checkpoint(tmp_path / 'a.pth')
        assert plain == written[:-1]
        assert buffer.current() == 1

    def test_protocol_of_bytearrays(self, tmp_path):
        written = [bytearray(b'abc'), bytearray()]
        torch.save(written, tmp_path / 'a.pth', pickle_protocol=5)
        assert read_checkpoint(tmp_path / 'a.pth') == written

    def test_python_2(self, tmp_path):
        """Pairs in a list, as its dicts in order were written."""
        pairs = [['a', 1], ['b', 2]]
        data = opcodes(name('collections', 'OrderedDict'), (pairs,), pickle.REDUCE)
        read = read_checkpoint(write_pickle(tmp_path / 'a.pth', data, legacy=True))
        assert read == collections.OrderedDict(pairs)

    def test_parts_of_storages(self, tmp_path):
        """As they were written in the format of before torch 1.6."""
        reference = ['storage', name('torch', 'FloatStorage'), '0', 'cpu', 4]
        part = [pickle.MARK, *reference, ('part', 1, 2), pickle.TUPLE, pickle.BINPERSID]
        data = opcodes(
            *(name('torch._utils', '_rebuild_tensor_v2'), pickle.MARK, *part),
            *(0, (2,), (1,), False, {}, pickle.TUPLE, pickle.REDUCE),
        )
        parts = [*legacy_parts(data)[:-1], pickle.dumps(['0'], 2)]
        storage = (4).to_bytes(8, 'little') + torch.arange(4.0).numpy().tobytes()
        (tmp_path / 'a.pth').write_bytes(b''.join([*parts, storage]))
        assert read_checkpoint(tmp_path / 'a.pth').tolist() == [1, 2]


class TestNumbersOfATensor:
    """What torch can load is loaded."""

    @LEGACY
    @pytest.mark.parametrize(
        'dtype',
        [
            *(torch.float8_e4m3fn, torch.float8_e5m2, torch.complex128, torch.int8),
            *(torch.bool, torch.float16, torch.bfloat16, torch.uint8, torch.float64),
        ],
        ids=str,
    )
    def test_dtypes(self, tmp_path, dtype, legacy):
        written = torch.arange(6).reshape(2, 3).to(dtype)
        try:
            path = save({'w': written}, tmp_path / 'a.pth', legacy)
        except (KeyError, RuntimeError):
            pytest.skip('this torch does not write it')
        read = read_checkpoint(path)['w']
        assert read.dtype == dtype and read.shape == written.shape
        assert torch.equal(read.view(torch.uint8), written.view(torch.uint8))

    @pytest.mark.parametrize('dtype', [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
    def test_float8_of_a_newer_torch(self, tmp_path, dtype):
        """In bytes, which torch 2.1 cannot write so."""
        written = torch.arange(6).reshape(2, 3).to(dtype)
        path = save({'w': written.view(torch.uint8)}, tmp_path / 'a.pth')
        reference = [pickle.MARK, 'storage', name('torch.storage', 'UntypedStorage')]
        data = opcodes(
            *(name('torch._utils', '_rebuild_tensor_v3'), pickle.MARK),
            *(*reference, '0', 'cpu', 6, pickle.TUPLE, pickle.BINPERSID),
            *(0, (2, 3), (3, 1), False, {}, name('torch', str(dtype)[6:])),
            *(pickle.TUPLE, pickle.REDUCE),
        )
        read = read_checkpoint(replace_pickle(path, data))
        assert read.dtype == dtype and read.shape == (2, 3)
        assert torch.equal(read.view(torch.uint8), written.view(torch.uint8))

    def test_conjugated(self, tmp_path):
        written = torch.tensor([1 + 2j]).conj()
        read = read_checkpoint(save({'w': written}, tmp_path / 'a.pth'))['w']
        assert read.is_conj() and torch.equal(read, written)

    @LEGACY
    def test_tied_and_expanded(self, tmp_path, legacy):
        base = torch.arange(12.0).reshape(3, 4)
        written = {'a': base, 'b': base, 'c': base[1:, 2], 'd': torch.ones(1).expand(9, 2)}
        read = read_checkpoint(save(written, tmp_path / 'a.pth', legacy))
        for key, tensor in written.items():
            assert torch.equal(read[key], tensor)
            assert read[key].stride() == tensor.stride()
        assert read['a'].data_ptr() == read['b'].data_ptr()

    @LEGACY
    @pytest.mark.parametrize(
        'map_location',
        ['cpu', None, torch.device('cpu'), {'cuda:0': 'cpu'}, lambda storage, _: storage],
        ids=['cpu', 'None', 'device', 'dict', 'function'],
    )
    def test_places(self, tmp_path, map_location, legacy):
        path = save({'w': torch.arange(3.0)}, tmp_path / 'a.pth', legacy)
        read = read_checkpoint(path, map_location)
        assert torch.equal(read['w'], torch.arange(3.0))

    @LEGACY
    def test_a_storage_that_is_moved(self, tmp_path, legacy):
        """As to a GPU."""
        path = save({'w': torch.arange(3.0)}, tmp_path / 'a.pth', legacy)
        read = read_checkpoint(path, lambda storage, _: storage.clone())
        assert torch.equal(read['w'], torch.arange(3.0))


class TestSafetensors:
    """Files of the library of that name."""

    def write(self, path: Path, metadata: dict | None) -> Path:
        tensors = {
            'a.weight': torch.arange(12.0).reshape(3, 4),
            'half': torch.ones(3, dtype=torch.float16),
            'flag': torch.tensor(True),
            'empty': torch.zeros(0, 2),
        }
        save_file(tensors, path, metadata=metadata)
        return path

    @pytest.mark.parametrize('mmap', [True, False])
    @pytest.mark.parametrize('name', ['a.safetensors', 'a.pth'])
    def test_own_meta(self, tmp_path, mmap, name):
        meta = {'CLASSES': ['cat', 'dog'], 'epoch': 3}
        metadata = {'format': 'pt', 'meta': json.dumps(meta)}
        path = self.write(tmp_path / name, metadata)
        read = read_checkpoint(path, mmap=mmap)
        assert read['meta'] == meta
        expected = load_file(path)
        assert read.keys() == {'state_dict', 'meta'}
        assert read['state_dict'].keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.equal(read['state_dict'][key], tensor)
            assert read['state_dict'][key].dtype == tensor.dtype
        read['state_dict']['a.weight'][0] = -1
        again = read_checkpoint(path)['state_dict']['a.weight']
        assert torch.equal(again, expected['a.weight']), 'the file is not written to'

    @pytest.mark.parametrize('metadata', [None, {}, {'format': 'pt'}], ids=str)
    def test_other_projects(self, tmp_path, metadata):
        read = read_checkpoint(self.write(tmp_path / 'a.safetensors', metadata))
        assert read['meta'] == {}
        assert len(read['state_dict']) == 4

    @pytest.mark.parametrize('meta', ['epoch 3', '"epoch 3"', '[1]', '', '[' * 10**5])
    def test_meta_in_another_form(self, tmp_path, meta):
        path = self.write(tmp_path / 'a.safetensors', {'meta': meta})
        read = read_checkpoint(path)
        assert read['meta'] == {}
        assert len(read['state_dict']) == 4

    def test_cut_short(self, tmp_path):
        path = self.write(tmp_path / 'a.safetensors', None)
        whole = path.read_bytes()
        for size in range(0, len(whole), 3):
            path.write_bytes(whole[:size])
            with pytest.raises(CheckpointError, match='it may be cut short'):
                read_checkpoint(path)

    def test_file_may_change_if_it_is_not_mapped(self, tmp_path):
        path = self.write(tmp_path / 'a.safetensors', None)
        read = read_checkpoint(path, mmap=False)['state_dict']['a.weight']
        with open(path, 'r+b') as file:
            file.write(bytes(path.stat().st_size))
        assert torch.equal(read, torch.arange(12.0).reshape(3, 4))


def shell(path: Path) -> str:
    return f'touch {path}'


CALLS = {
    'posix.system': lambda canary: Call(os.system, shell(canary)),
    'subprocess.Popen': lambda canary: Call(subprocess.Popen, ['touch', str(canary)]),
    'builtins.eval': lambda canary: Call(eval, f'open({str(canary)!r}, "w")'),
    'builtins.exec': lambda canary: Call(exec, f'open({str(canary)!r}, "w")'),
    'io.open': lambda canary: Call(open, str(canary), 'w'),
    'builtins.__import__': lambda canary: Call(__import__, 'antigravity'),
    'builtins.compile': lambda canary: Call(compile, '1', 'f', 'eval'),
    'builtins.type': lambda canary: Call(type, 'Name', (), {}),
    'operator.methodcaller': lambda canary: Call(operator.methodcaller('touch'), canary),
    'operator.attrgetter': lambda canary: operator.attrgetter('__class__'),
    'functools.partial': lambda canary: functools.partial(os.system, shell(canary)),
    'torch.storage._load_from_bytes': lambda canary: Call(
        torch.storage._load_from_bytes,
        pickle.dumps(Call(os.system, shell(canary)), 2),
    ),
    'torch.serialization.load': lambda canary: Call(torch.load, io.BytesIO()),
    'torch._utils._set_obj_state': lambda canary: Call(
        torch._utils._set_obj_state, HistoryBuffer, {'mean': os.system}
    ),
    'torch.nn.modules.linear.Linear': lambda canary: nn.Linear(1, 1),
    'types.SimpleNamespace': lambda canary: types.SimpleNamespace(a=1),
    'copyreg._reconstructor': lambda canary: Call(
        copyreg._reconstructor, HistoryBuffer, object, None
    ),
    'numpy.load': lambda canary: Call(np.load, str(canary), 'r', True),
    'numpy.dtype': lambda canary: np.array([Call(os.system, shell(canary))], object),
    'getattr': lambda canary: Call(getattr, HistoryBuffer, '__init__'),
    'numpy.fromfile': lambda canary: Call(np.fromfile, str(canary)),
    'mmengine.config.config.Config': lambda canary: Call(
        __import__('mmengine').Config.fromstring, f'open({str(canary)!r}, "w")', '.py'
    ),
}

HISTORY = name('mmengine.logging.history_buffer', 'HistoryBuffer')
ENCODE = name('_codecs', 'encode')
#: Of an array of one object, but with flags that let numpy take bytes for it.
FORGED = (3, '|', None, ('a',), {'a': (np.dtype('f8'), 0)}, 8, 1, 0)


NEW_ARRAY = opcodes(np.zeros(0))[2:-1]


def new_dtype(text: str, state: tuple) -> bytes:
    return opcodes(
        name('numpy', 'dtype'), (text, False, True), pickle.REDUCE, state, pickle.BUILD
    )[2:-1]


OPCODES = {
    'posix.system': [pickle.MARK, pickle.INST + b'posix\nsystem\n'],
    'collections.OrderedDict': [
        *(pickle.MARK, pickle.INST + b'collections\nOrderedDict\n'),
    ],
    'unusual kind': [pickle.MARK, name('builtins', 'dict'), pickle.OBJ],
    'unusual ': [name('builtins', 'dict'), (), {}, pickle.NEWOBJ_EX],
    'an object of builtins.dict': [name('builtins', 'dict'), (), pickle.NEWOBJ],
    'an object of mmengine.logging': [HISTORY, ([1],), pickle.NEWOBJ],
    # Slots of the state would be set on the class or function for good.
    'changed mmengine': [HISTORY, (None, {'mean': 1}), pickle.BUILD],
    'changed builtins.dict': [name('builtins', 'dict'), (None, {'a': 1}), pickle.BUILD],
    'changed mmrep.checkpoints.unpickling._encode': [
        *(ENCODE, (None, {'__defaults__': ('latin1',)}), pickle.BUILD),
    ],
    'changed collections.OrderedDict': [
        *(name('collections', 'OrderedDict'), (), pickle.REDUCE),
        *({'dump_patches': True}, pickle.BUILD),
    ],
    'a call of numpy.ndarray': [name('numpy', 'ndarray'), ((1,),), pickle.REDUCE],
    'a call of builtins.str': [b'', 'text', (1,), pickle.REDUCE],
    'a call of mmengine.logging': [HISTORY, (), pickle.REDUCE],
    "getattr of '__globals__'": [
        name('builtins', 'getattr'),
        *(HISTORY, '__globals__', pickle.TUPLE2, pickle.REDUCE),
    ],
    # On the way to eval and to the globals of what may be called.
    "getattr of '__self__'": [
        *(name('builtins', 'getattr'), name('builtins', 'getattr')),
        *('__self__', pickle.TUPLE2, pickle.REDUCE),
    ],
    "encode to 'rot13'": [ENCODE, ('text', 'rot13'), pickle.REDUCE],
    "numpy.dtype('O')": [name('numpy', 'dtype'), ('O', False, True), pickle.REDUCE],
    "numpy.dtype('f8,O')": [name('numpy', 'dtype'), ('f8,O',), pickle.REDUCE],
    "numpy.dtype('V8')": [new_dtype('V8', FORGED)],
    "changed numpy.dtype 'float64'": [new_dtype('f8', FORGED)],
    "changed numpy.dtype 'float32'": [
        new_dtype('f4', (3, '<', None, None, None, 1, 1, 0)),
    ],
}


class TestMalice:
    """What could run code is not run, and named."""

    @LEGACY
    @pytest.mark.parametrize('nested', [False, True], ids=['bare', 'nested'])
    @pytest.mark.parametrize('named', CALLS)
    def test_call(self, tmp_path, named, nested, legacy):
        canary = tmp_path / 'canary'
        value = CALLS[named](canary)
        if nested:
            value = {'state_dict': {'w': torch.ones(1)}, 'meta': [{'x': value}]}
            path = save(value, tmp_path / 'a.pth', legacy)
        else:
            path = write_pickle(tmp_path / 'a.pth', pickle.dumps(value, 2), legacy)
        with pytest.raises(CheckpointError, match='which could run code') as info:
            read_checkpoint(path)
        assert f'{path} holds ' in str(info.value)
        assert named in str(info.value)
        assert not canary.exists()

    @LEGACY
    @pytest.mark.parametrize('message', OPCODES)
    def test_opcodes(self, tmp_path, message, legacy):
        path = write_pickle(tmp_path / 'a.pth', opcodes(*OPCODES[message]), legacy)
        with pytest.raises(CheckpointError) as info:
            read_checkpoint(path)
        assert message in str(info.value)
        assert 'which could run code' in str(info.value)

    @pytest.mark.parametrize('part', range(5))
    def test_every_part_of_a_legacy_file(self, tmp_path, part):
        canary = tmp_path / 'canary'
        parts = legacy_parts(pickle.dumps({}, 2))
        parts[part] = pickle.dumps(CALLS['posix.system'](canary), 2)
        path = tmp_path / 'a.pth'
        path.write_bytes(b''.join(parts))
        with pytest.raises(CheckpointError, match=r'posix\.system'):
            read_checkpoint(path)
        assert not canary.exists()

    def test_named_methods_are_not_called(self, tmp_path):
        data = opcodes(
            name('mmengine.logging.history_buffer', 'HistoryBuffer.mean'),
            *((), pickle.REDUCE),
        )
        # Its name is one from protocol 4 on.
        data = pickle.PROTO + b'\x04' + data[2:]
        with pytest.raises(CheckpointError, match='a call of mmengine'):
            read_checkpoint(write_pickle(tmp_path / 'a.pth', data, legacy=False))

    def test_extension_that_is_in_use(self, tmp_path):
        """pickle finds those without asking for their names."""
        canary = tmp_path / 'canary'
        copyreg.add_extension('posix', 'system', 240)
        try:
            copyreg._extension_cache[240] = os.system
            data = opcodes(
                pickle.EXT1 + b'\xf0', (shell(canary),), pickle.REDUCE, pickle.POP, 1
            )
            with pytest.raises(CheckpointError, match=r'a call of posix\.system'):
                read_checkpoint(write_pickle(tmp_path / 'a.pth', data, legacy=False))
        finally:
            copyreg.remove_extension('posix', 'system', 240)
        assert not canary.exists()

    @LEGACY
    @pytest.mark.parametrize(
        'state',
        [
            (1, (3,), np.dtype('f8'), False, bytes(8)),
            (1, (-1, -1), np.dtype('f8'), False, bytes(8)),
            (1, (2**62, 4), np.dtype('f8'), False, b''),
            (1, (1,), np.dtype('f8'), False, [1.0]),
        ],
        ids=['short', 'negative', 'overflow', 'list'],
    )
    def test_array_with_other_contents(self, tmp_path, state, legacy):
        data = opcodes(NEW_ARRAY, state, pickle.BUILD)
        with pytest.raises(CheckpointError, match=r'numpy\.ndarray has a shape'):
            read_checkpoint(write_pickle(tmp_path / 'a.pth', data, legacy))

    def test_source_code_of_a_class_is_not_written(self, tmp_path, monkeypatch):
        """torch compares it and writes a patch, in the format of before torch 1.6."""
        monkeypatch.chdir(tmp_path)
        module = ('module', collections.OrderedDict, 'file.py', 'text of the attacker')
        data = opcodes(module, pickle.BINPERSID)
        path = write_pickle(tmp_path / 'a.pth', data, legacy=True)
        with pytest.raises(CheckpointError):
            read_checkpoint(path)
        assert os.listdir() == ['a.pth']

    def test_config_in_the_meta_is_not_run(self, run_checkpoint, tmp_path, safe_reading):
        """Runner.resume would run it."""
        canary = tmp_path / 'canary'
        checkpoint = torch.load(run_checkpoint, weights_only=False)
        checkpoint['meta']['config'] = f'open({str(canary)!r}, "w")'
        path = save(checkpoint, tmp_path / 'a.pth')
        scheduler = dict(type='OneCycleLR', eta_max=0.1, total_steps=2, by_epoch=False)
        runner = tiny_runner(
            tmp_path,
            optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.01)),
            param_scheduler=[dict(type='LinearLR', end=1), scheduler],
            load_from=str(path),
            resume=True,
        )
        runner.train()
        assert runner.epoch == 1
        assert not canary.exists()


class TestDamage:
    """A file that is no checkpoint is told as such."""

    @pytest.mark.parametrize('legacy', [False, True])
    @pytest.mark.parametrize('share', [0.1, 0.5, 0.99])
    def test_cut_short(self, run_checkpoint, tmp_path, share, legacy):
        whole = torch.load(run_checkpoint, weights_only=False)
        path = save(whole, tmp_path / 'a.pth', legacy)
        os.truncate(path, int(path.stat().st_size * share))
        with pytest.raises(CheckpointError, match='it may be cut short') as info:
            read_checkpoint(path)
        assert len(str(info.value)) < 400

    @pytest.mark.parametrize(
        'content', [b'', b'hello\n', b'PK\x03\x04', bytes(range(256)) * 9, b'\x80\x02.']
    )
    def test_other_files(self, tmp_path, content):
        path = tmp_path / 'a.pth'
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match='cannot be read as a checkpoint') as info:
            read_checkpoint(path)
        assert '\n' not in str(info.value)

    def test_hdf5(self, tmp_path):
        path = tmp_path / 'a.weights.h5'
        path.write_bytes(b'\x89HDF\r\n\x1a\n' + bytes(99))
        with pytest.raises(CheckpointError, match=r'is an HDF5 file: import it with tools'):
            read_checkpoint(path)

    def test_missing_file(self, tmp_path):
        with pytest.raises(CheckpointError, match=r'no\.pth does not exist'):
            read_checkpoint(tmp_path / 'no.pth')

    @pytest.mark.skipif(os.geteuid() == 0, reason='root may read everything')
    def test_no_permission(self, tmp_path):
        path = save({}, tmp_path / 'a.pth')
        path.chmod(0)
        with pytest.raises(
            CheckpointError, match='may not be read: ask for the permission'
        ):
            read_checkpoint(path)

    @pytest.mark.parametrize('error', [PermissionError, OSError(5, 'broken disk')])
    def test_no_access(self, tmp_path, monkeypatch, error):
        path = save({}, tmp_path / 'a.pth')

        def refuse(*_, **__):
            raise error

        monkeypatch.setattr('builtins.open', refuse)
        expected = 'may not be read' if error is PermissionError else 'broken disk'
        with pytest.raises(CheckpointError, match=expected):
            read_checkpoint(path)

    @pytest.mark.parametrize('name', ['a\0b', 'x' * 5000, '~nobody-of-this-name/a.pth', ''])
    def test_names_of_nothing(self, name):
        with pytest.raises(CheckpointError, match=r'cannot be opened|does not exist'):
            read_checkpoint(name)

    def test_address(self):
        with pytest.raises(CheckpointError, match=r'https://host/a\.pth is an address'):
            read_checkpoint('https://host/a.pth')

    def test_folder(self, tmp_path):
        with pytest.raises(CheckpointError, match='is a folder'):
            read_checkpoint(tmp_path)

    def test_home(self, tmp_path, monkeypatch):
        monkeypatch.setenv('HOME', str(tmp_path))
        save({'a': 1}, tmp_path / 'a.pth')
        assert read_checkpoint('~/a.pth') == {'a': 1}

    def test_torchscript(self, tmp_path):
        path = tmp_path / 'a.pt'
        torch.jit.script(nn.Linear(1, 1)).save(path)
        with pytest.raises(CheckpointError, match='TorchScript program'):
            read_checkpoint(path)


class TestLoaderOfMMEngine:
    """mmengine reads local checkpoints safely once the tools have asked for it."""

    def test_reads_a_run(self, run_checkpoint, safe_reading):
        read = CheckpointLoader.load_checkpoint(str(run_checkpoint), map_location='cpu')
        assert read['meta']['epoch'] == 1

    def test_refuses_code(self, tmp_path, safe_reading):
        canary = tmp_path / 'canary'
        path = save(CALLS['posix.system'](canary), tmp_path / 'a.pth')
        with pytest.raises(CheckpointError):
            CheckpointLoader.load_checkpoint(str(path))
        assert not canary.exists()

    def test_file_may_change_afterwards(self, tmp_path, safe_reading):
        """As training may write the file anew that it was resumed from."""
        path = save({'w': torch.arange(5000.0)}, tmp_path / 'a.pth')
        read = CheckpointLoader.load_checkpoint(str(path))
        with open(path, 'r+b') as file:
            file.write(bytes(path.stat().st_size))
        assert torch.equal(read['w'], torch.arange(5000.0))


@pytest.mark.parametrize('legacy', [False, True])
def test_what_a_command_line_gave(tmp_path, legacy):
    """As in the checkpoints of MAE and its like, whose weights are of use."""
    given = argparse.Namespace(lr=0.1, sizes=[1, 2], inner=argparse.Namespace(name='x'))
    path = tmp_path / 'a.pth'
    torch.save(dict(args=given), path, _use_new_zipfile_serialization=not legacy)
    args = read_checkpoint(path)['args']
    assert args == dict(lr=0.1, sizes=[1, 2], inner=dict(name='x'))
    assert type(args) is type(args['inner']) is dict


@pytest.mark.parametrize(
    'array',
    [
        np.arange(6.0).reshape(2, 3),
        np.asfortranarray(np.arange(6, dtype='>i4').reshape(2, 3)),
        np.array(['a', 'bc']),
        np.zeros((0, 3), np.float32),
        np.array(3.0),
    ],
)
def test_arrays_of_protocol_5(tmp_path, array):
    torch.save(dict(array=array), tmp_path / 'a.pth', pickle_protocol=5)
    read = read_checkpoint(tmp_path / 'a.pth')['array']
    assert read.dtype == array.dtype
    np.testing.assert_array_equal(read, array)
    # As any array that was read.
    read[...] = 0


def test_tensors_with_attributes(tmp_path):
    tensor = torch.ones(2)
    tensor.origin = 'x'
    torch.save(dict(a=dict(b=tensor)), tmp_path / 'a.pth')
    with pytest.raises(
        CheckpointError, match=r'a tensor with attributes .* \(a\.b\): save'
    ):
        read_checkpoint(tmp_path / 'a.pth')
