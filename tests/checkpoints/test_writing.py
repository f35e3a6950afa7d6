import collections
import enum
import hashlib
import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from mmengine.config import ConfigDict
from safetensors import safe_open
from torch import nn

from mmrep.checkpoints import (
    plain,
    read_checkpoint,
    save_checkpoint,
    sha256_of,
    write_checkpoint,
)
from mmrep.errors import UserError

SUFFIXES = ['.pth', '.safetensors']


class Color(enum.IntEnum):
    RED = 1


class TestWriteCheckpoint:
    @pytest.mark.parametrize('mmap', [False, True])
    def test_readable_with_weights_only(self, tmp_path, mmap):
        path = tmp_path / 'a.pth'
        model = nn.Linear(2, 3)
        meta = {
            'dataset_meta': ConfigDict(classes=('a', 'b'), palette=np.eye(2)),
            'label_map': {np.int64(1): np.float32(2)},
            'color': Color.RED,
            'path': Path('a/b'),
            'order': collections.OrderedDict(a={1}),
        }
        write_checkpoint(path, dict(model.named_parameters()), meta)
        read = torch.load(str(path), weights_only=True, mmap=mmap)
        assert read.keys() == {'state_dict', 'meta'}
        assert torch.equal(read['state_dict']['weight'], model.weight)
        assert type(read['state_dict']['weight']) is torch.Tensor
        assert not read['state_dict']['weight'].requires_grad
        assert read['meta'] == {
            'dataset_meta': {'classes': ('a', 'b'), 'palette': [[1, 0], [0, 1]]},
            'label_map': {1: 2},
            'color': 1,
            'path': 'a/b',
            'order': {'a': [1]},
        }
        assert read_checkpoint(path)['meta'] == read['meta']

    @pytest.mark.parametrize('suffix', SUFFIXES)
    @pytest.mark.parametrize('size', [1, 400, 10**6])
    def test_limit_of_the_file_size_keeps_the_old_file(self, tmp_path, suffix, size):
        """torch's writer hides the error of the system behind another, at some sizes."""
        path = tmp_path / f'a{suffix}'
        write_checkpoint(path, {'w': torch.ones(1)}, {})
        before = path.read_bytes()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
        try:
            with pytest.raises(UserError) as info:
                write_checkpoint(path, {'w': torch.ones(size)}, {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert str(info.value) == (
            f'{path} cannot be written (File too large): nothing has changed; give another '
            'path, or check the free space and permissions there'
        )
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == [path.name]

    @pytest.mark.parametrize('suffix', SUFFIXES)
    @pytest.mark.parametrize('size', [1, 400, 10**6])
    def test_full_disk(self, suffix, size):
        with pytest.raises(OSError, match='No space left on device'):
            save_checkpoint(Path('/dev/full'), suffix, {'w': torch.ones(size)}, {})


class TestSameBytes:
    """The same contents are the same bytes, whatever the file's name, at any time."""

    @pytest.fixture(params=SUFFIXES)
    def same(self, request, tmp_path):
        def same(*states: dict, **meta) -> None:
            contents = set()
            # The safetensors library orders metadata by chance: one in 2^15 would pass.
            for number, state in enumerate(states * 8):
                path = tmp_path / str(number) / f'{number}{request.param}'
                write_checkpoint(path, state, meta)
                contents.add(path.read_bytes())
            assert len(contents) == 1

        return same

    def test_names(self, same):
        weights = {'b': torch.ones(3), 'a': torch.arange(4), 'c': torch.ones(()).half()}
        same(weights, dict(weights), classes=('a', 'b'))

    def test_what_a_tensor_is_a_part_of(self, same):
        same({'a': torch.ones(5)}, {'a': torch.arange(9.0).clamp(max=1)[1:6]})
        same({'a': torch.ones(5)}, {'a': torch.ones(1).expand(5)})

    def test_order_of_sets(self):
        """It is another in every process, but the same for numbers here."""
        assert plain({3, 10**20, 'b', 'a'}) == ['a', 'b', 10**20, 3]
        assert plain(frozenset({2**61, 1})) == (1, 2**61)


def read_safetensors(path: Path) -> tuple[dict, dict]:
    """Weights and ``meta`` by the library alone."""
    with safe_open(path, 'pt') as file:
        metadata = file.metadata()
    # As the library aligns the weights.
    assert int.from_bytes(path.read_bytes()[:8], 'little') % 8 == 0
    assert metadata.keys() == {'format', 'meta'} and metadata['format'] == 'pt'
    return safetensors.torch.load_file(path), json.loads(metadata['meta'])


class TestSafetensors:
    def test_contents(self, tmp_path):
        path = tmp_path / 'a.safetensors'
        weights = {
            'float32': torch.randn(2, 3),
            'float64': torch.randn(2, 3).double(),
            'float16': torch.randn(2, 3).half(),
            'bfloat16': torch.randn(2, 3).bfloat16(),
            'int64': torch.tensor(5),
            'bool': torch.tensor([True, False, True]),
            'channels last': torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
            'transposed': torch.randn(2, 3).t(),
            'every other': torch.arange(10)[::2],
            'expanded': torch.randn(3, 1).expand(3, 4),
            'empty': torch.empty(0, 3),
            'ä "b"\n': nn.Parameter(torch.randn(2)),
        }
        meta = {'classes': ('ä', '"', '\udcff\n'), 'at': Path('a'), 3: {'b': {2, 1}}}
        meta |= {'palette': torch.eye(2), 'bytes': b'a', 'nan': float('inf')}
        write_checkpoint(path, weights, meta)
        found, found_meta = read_safetensors(path)
        assert found.keys() == weights.keys()
        for key, value in weights.items():
            assert found[key].dtype == value.dtype
            assert torch.equal(found[key], value)
        assert found_meta == {
            'classes': ['ä', '"', '\\udcff\n'],
            'at': 'a',
            '3': {'b': [1, 2]},
            'palette': [[1, 0], [0, 1]],
            'bytes': "b'a'",
            'nan': float('inf'),
        }

    def test_shared_memory(self, tmp_path):
        path = tmp_path / 'a.safetensors'
        weight = torch.randn(4, 3)
        weights = {'a': weight, 'b': weight, 'row': weight[1], 'turned': weight.t()}
        write_checkpoint(path, weights, {})
        found, _ = read_safetensors(path)
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[key], weights[key]) for key in weights)

    @pytest.mark.parametrize(
        ('weight', 'meta'),
        [
            (torch.eye(2).to_sparse(), {}),
            (torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8), {}),
            (torch.empty(2, device='meta'), {}),
            (torch.ones(2), {(1, 2): 3}),
        ],
        ids=['sparse', 'quantized', 'without contents', 'key that JSON has not'],
    )
    def test_refusals(self, tmp_path, weight, meta):
        match = (
            r'^a \.safetensors file cannot hold this .*: give a name that ends in \.pth$'
        )
        with pytest.raises(UserError, match=match):
            write_checkpoint(tmp_path / 'a.safetensors', {'w': weight}, meta)
        assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ('value', 'expected'),
    [
        (np.float64(0.5), 0.5),
        (np.bool_(True), True),
        (np.str_('a'), 'a'),
        ({'ä\udcff': 'b\udcff'}, {r'ä\udcff': r'b\udcff'}),
        (np.array([[1, 2]], 'i2'), [[1, 2]]),
        (np.array(['a', None], object), ['a', None]),
        (np.longdouble(0.5), '0.5'),
        (Color.RED, 1),
        ({np.int64(1): {2: (np.int8(3), [{4}])}}, {1: {2: (3, [[4]])}}),
        ({frozenset({4, 3}): 1}, {(3, 4): 1}),
        (collections.namedtuple('Pair', 'a b')(1, 2), (1, 2)),
        (torch.Size([1, 2]), (1, 2)),
        (b'a', b'a'),
        (None, None),
        (object, "<class 'object'>"),
    ],
    ids=ascii,
)
def test_plain(value, expected):
    def types(value):
        if isinstance(value, dict):
            return [types(item) for pair in value.items() for item in pair]
        if isinstance(value, list | tuple):
            return [type(value), *map(types, value)]
        return type(value)

    assert plain(value) == expected
    assert types(plain(value)) == types(expected)


def test_sha256(tmp_path):
    path = tmp_path / 'a'
    path.write_bytes(bytes(3 << 20) + b'end')
    assert sha256_of(path) == hashlib.sha256(path.read_bytes()).hexdigest()
