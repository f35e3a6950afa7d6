import collections
import enum
import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from torch import nn

from mmrep.checkpoints import (
    atomic_write,
    plain,
    read_checkpoint,
    refuse_existing,
    sha256_of,
    write_checkpoint,
)
from mmrep.errors import UserError


class Color(enum.IntEnum):
    RED = 1


class TestAtomicWrite:
    def test_whole(self, tmp_path):
        path = tmp_path / 'new' / 'folder' / 'a.txt'
        with atomic_write(path) as temporary:
            temporary.write_text('new')
            assert not path.exists()
        assert path.read_text() == 'new'
        assert os.listdir(path.parent) == ['a.txt']

    @pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt])
    @pytest.mark.parametrize('old', [None, 'old'])
    def test_not_at_all(self, tmp_path, error, old):
        path = tmp_path / 'a.txt'
        if old:
            path.write_text(old)
        with pytest.raises(error), atomic_write(path) as temporary:
            temporary.write_text('half of')
            raise error
        assert os.listdir(tmp_path) == (['a.txt'] if old else [])
        assert not old or path.read_text() == old

    def test_killed(self, tmp_path):
        path = tmp_path / 'a.txt'
        path.write_text('old')
        code = (
            'import os, signal, sys\n'
            'from mmrep.checkpoints import atomic_write\n'
            'with atomic_write(sys.argv[1]) as temporary:\n'
            "    temporary.write_text('half of')\n"
            '    os.kill(os.getpid(), signal.SIGKILL)\n'
        )
        done = subprocess.run([sys.executable, '-c', code, path], check=False)
        assert done.returncode == -signal.SIGKILL
        assert path.read_text() == 'old'

    def test_it_is_on_the_disk_before_it_takes_its_name(self, tmp_path, monkeypatch):
        path = tmp_path / 'a.txt'
        synced = []

        def fsync(handle: int) -> None:
            synced.append((os.fstat(handle).st_ino, path.exists()))

        monkeypatch.setattr(os, 'fsync', fsync)
        with atomic_write(path) as temporary:
            temporary.write_text('new')
        # The file while it has no name yet, and then the folder that holds the name.
        assert synced == [(path.stat().st_ino, False), (tmp_path.stat().st_ino, True)]

    @pytest.mark.parametrize('umask', [0o022, 0o077])
    def test_mode_is_that_of_any_file(self, tmp_path, umask):
        before = os.umask(umask)
        try:
            with atomic_write(tmp_path / 'a.txt'):
                pass
            assert os.umask(umask) == umask
        finally:
            os.umask(before)
        assert (tmp_path / 'a.txt').stat().st_mode & 0o777 == 0o666 & ~umask


class TestWriteCheckpoint:
    def test_readable_with_weights_only(self, tmp_path):
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
        read = torch.load(path, weights_only=True)
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

    def test_failure_keeps_the_old_file(self, tmp_path, monkeypatch):
        path = tmp_path / 'a.pth'
        write_checkpoint(path, {'w': torch.ones(1)}, {})
        before = path.read_bytes()

        def save_half(value, file):
            Path(file).write_bytes(before[:100])
            raise OSError('No space left on device')

        monkeypatch.setattr(torch, 'save', save_half)
        with pytest.raises(OSError, match='No space'):
            write_checkpoint(path, {'w': torch.zeros(1)}, {})
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == ['a.pth']


@pytest.mark.parametrize(
    ('value', 'expected'),
    [
        (np.float64(0.5), 0.5),
        (np.bool_(True), True),
        (np.str_('a'), 'a'),
        (np.array([[1, 2]], 'i2'), [[1, 2]]),
        (np.array(['a', None], object), ['a', None]),
        (np.longdouble(0.5), '0.5'),
        (Color.RED, 1),
        ({np.int64(1): {2: (np.int8(3), [frozenset({4})])}}, {1: {2: (3, [[4]])}}),
        (collections.namedtuple('Pair', 'a b')(1, 2), (1, 2)),
        (torch.Size([1, 2]), (1, 2)),
        (b'a', b'a'),
        (None, None),
        (object, "<class 'object'>"),
    ],
    ids=str,
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


def test_refuse_existing(tmp_path):
    path = tmp_path / 'a.pth'
    refuse_existing(path, tmp_path / 'no' / 'folder.pth')
    path.touch()
    with pytest.raises(UserError, match=r'a\.pth exists: .* --overwrite'):
        refuse_existing(tmp_path / 'b.pth', path)
    refuse_existing(path, overwrite=True)
    with pytest.raises(UserError, match='is a folder'):
        refuse_existing(tmp_path, overwrite=True)


def test_sha256(tmp_path):
    path = tmp_path / 'a'
    path.write_bytes(bytes(3 << 20) + b'end')
    assert sha256_of(path) == hashlib.sha256(path.read_bytes()).hexdigest()
