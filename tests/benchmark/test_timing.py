"""What is counted, not how long it takes."""

import time
from collections import Counter

import pytest
import torch

from mmrep.benchmark import interleave

#: Longer than a measurement that repeats its call.
LONG = 0.025


@pytest.fixture
def calls() -> list[str]:
    return []


@pytest.fixture
def functions(calls):
    def function(name: str):
        def run() -> None:
            calls.append(name)
            time.sleep(LONG)

        return run

    return {name: function(name) for name in 'abc'}


def test_turns(functions, calls):
    """Each once a round, and the first of a round is another one every time."""
    measured = interleave(functions, rounds=4, warm_up=1)
    assert list(measured) == ['a', 'b', 'c']
    # Before: a warm-up, and what tells how often to repeat (the timer warms up, too).
    rounds = calls[-2 * 4 * 3 :] if calls[-1] == calls[-2] else calls[-4 * 3 :]
    order = [
        name for index, name in enumerate(rounds) if not index or name != rounds[index - 1]
    ]
    assert ''.join(order) == 'abcbcacababc'
    assert len(set(Counter(calls).values())) == 1


def test_times(functions):
    for measurement in interleave(functions, rounds=3, warm_up=0).values():
        assert len(measurement.times) == 3
        assert all(LONG <= seconds < 10 * LONG for seconds in measurement.times)
        assert LONG <= measurement.median < 10 * LONG
        assert measurement.iqr >= 0


def test_short_functions_are_repeated(calls):
    (measurement,) = interleave({'a': lambda: calls.append('a')}, rounds=2).values()
    assert len(calls) > 100
    # Of one call, not of all.
    assert 0 < measurement.median < 1e-3


@pytest.mark.parametrize('warm_up', [0, 3])
def test_warm_up(warm_up):
    counts = Counter()
    functions = {'a': lambda: (counts.update('a'), time.sleep(LONG))}
    interleave(functions, rounds=1, warm_up=warm_up)
    timed = counts['a'] - warm_up
    assert timed == interleaved_calls(rounds=1)


def interleaved_calls(rounds: int) -> int:
    """Of a long function without a warm-up."""
    counts = Counter()
    functions = {'a': lambda: (counts.update('a'), time.sleep(LONG))}
    interleave(functions, rounds=rounds, warm_up=0)
    return counts['a']


@pytest.mark.parametrize('threads', [None, 1, 2])
def test_threads(threads):
    seen = set()
    function = {'a': lambda: (seen.add(torch.get_num_threads()), time.sleep(LONG))}
    before = torch.get_num_threads()
    interleave(function, rounds=1, warm_up=0, threads=threads)
    assert seen == {threads or before}
    assert torch.get_num_threads() == before
