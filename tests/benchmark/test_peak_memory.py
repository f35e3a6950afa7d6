import pytest
import torch

from mmrep.benchmark import peak_memory

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
