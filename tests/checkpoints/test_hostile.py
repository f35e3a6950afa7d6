"""Hostile files end with a sentence, soon, and in little memory."""

import resource
import time
from pathlib import Path

import pytest
from hostile import HOSTILE

from mmrep.checkpoints import read_checkpoint
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


@pytest.mark.parametrize(
    ('make', 'says'),
    [pytest.param(make, says, id=name) for name, make, says in HOSTILE],
)
def test_hostile(make, says, tmp_path, one_gigabyte):
    path = tmp_path / 'a.pth'
    make(path)
    path = next(iter(tmp_path.iterdir()))
    start = time.process_time()
    with pytest.raises(CheckpointError) as info:
        read_checkpoint(path)
    assert time.process_time() - start < 5
    message = str(info.value)
    assert says in message
    assert str(path) in message
    assert '\n' not in message and len(message) < 700
