import pytest
import torch
from torch.utils.checkpoint import checkpoint

from mmrep.benchmark import kept_memory, peak_memory

MIB = 2**20


def tensor(mebibytes: int) -> torch.Tensor:
    return torch.empty(mebibytes * MIB, dtype=torch.uint8)


def in_turns() -> None:
    for mebibytes in (3, 5, 2):
        tensor(mebibytes)


def together() -> None:
    _held = tensor(3), tensor(5)
    tensor(2)


def one_after_the_other() -> None:
    first = tensor(3)
    del first
    _second = tensor(5)
    tensor(1)


@pytest.mark.parametrize(
    ('function', 'mebibytes'),
    [(in_turns, 5), (together, 10), (one_after_the_other, 6), (lambda: tensor(7), 7)],
)
def test_the_most_that_is_held_at_once(function, mebibytes):
    assert peak_memory(function) == mebibytes * MIB


def test_nothing():
    assert peak_memory(lambda: None) == 0


def test_what_was_there_does_not_count():
    before = tensor(9)
    assert peak_memory(lambda: before.clone()) == 9 * MIB
    assert peak_memory(lambda: before.zero_()) == 0


def test_what_stays_counts():
    kept = []
    assert peak_memory(lambda: kept.append(tensor(4))) == 4 * MIB
    # Of what others let go of, nothing is taken off.
    assert peak_memory(lambda: (kept.clear(), tensor(1))) <= MIB


def two_sigmoids(x: torch.Tensor) -> torch.Tensor:
    """Each keeps its output; the second one's is the result."""
    return x.sigmoid().sigmoid()


@pytest.mark.parametrize(
    ('function', 'maps'),
    [
        (lambda x: x + 1, 0),
        (two_sigmoids, 1),
        (lambda x: two_sigmoids(x).square(), 2),
        # The input, and a random generator's state of 5 KiB.
        (lambda x: checkpoint(two_sigmoids, x, use_reentrant=False), 1),
    ],
)
def test_what_is_kept_for_the_backward_pass(function, maps):
    x = torch.zeros(MIB, requires_grad=True)
    kept = kept_memory(lambda: function(x.clone())) / (4 * MIB)
    assert kept == pytest.approx(maps, abs=0.01)


def test_nothing_is_kept_without_gradients():
    x = torch.zeros(MIB)
    assert kept_memory(lambda: two_sigmoids(x.clone())) == 0
