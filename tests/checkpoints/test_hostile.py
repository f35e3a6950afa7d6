"""Hostile files end with a sentence, soon, and in little memory."""

import pickle
import resource
import sys
import time
from pathlib import Path

import pytest
from hostile import HOSTILE
from pickles import opcodes, write_pickle

from mmrep.checkpoints import read_checkpoint, unpickling
from mmrep.errors import CheckpointError


@pytest.fixture
def one_gigabyte():
    """No more memory than this process has and one gigabyte."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path('/proc/self/statm').read_text().split()[0])
    more = pages * resource.getpagesize() + (1 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (more, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def test_names_are_different():
    assert len({name for name, *_ in HOSTILE}) == len(HOSTILE) >= 60


def test_every_step_is_paid_for(tmp_path, monkeypatch):
    """Which two million sets, of a byte each, would show at length."""
    monkeypatch.setattr(unpickling, '_ALLOWANCE', 1_000_000)
    data = {count: pickle.MARK + pickle.EMPTY_SET * count for count in (4900, 5100)}
    path = write_pickle(tmp_path / 'a.pth', opcodes(data[4900], pickle.LIST), False)
    assert len(read_checkpoint(path)) == 4900
    path = write_pickle(tmp_path / 'a.pth', opcodes(data[5100], pickle.LIST), False)
    with pytest.raises(CheckpointError, match='more values than its size'):
        read_checkpoint(path)


def test_wide_texts_are_paid_for(tmp_path, monkeypatch):
    """One wide character makes all of a text four times as large."""
    monkeypatch.setattr(unpickling, '_ALLOWANCE', 10_000)
    text = 'x' * 100_000
    path = write_pickle(tmp_path / 'a.pth', opcodes(text), False)
    assert read_checkpoint(path) == text
    path = write_pickle(tmp_path / 'a.pth', opcodes(text + '\U0001f600'), False)
    with pytest.raises(CheckpointError, match='more values than its size'):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ('make', 'says'),
    [pytest.param(make, says, id=name) for name, make, says in HOSTILE],
)
def test_hostile(make, says, tmp_path, one_gigabyte, tally):
    path = tmp_path / 'a.pth'
    make(path)
    path = next(iter(tmp_path.iterdir()))
    start = time.process_time()
    with pytest.raises(CheckpointError) as info:
        read_checkpoint(path)
    # A tracer of lines, as that of coverage, takes several times as long.
    assert time.process_time() - start < 5 or sys.gettrace() is not None
    message = str(info.value)
    assert says in message
    assert str(path) in message
    assert '\n' not in message and len(message) < 700
    tally('hostile files')
