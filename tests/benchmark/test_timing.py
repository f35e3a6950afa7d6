"""What is counted, not how long it takes."""

import itertools
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
    # A measurement is several calls; before the rounds each is warmed up and tried.
    order = ''.join(name for name, _ in itertools.groupby(calls))
    assert order == 'abc' + 'abc' + 'bca' + 'cab' + 'abc'
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


def test_threads():
    """As many as torch is set to, and not the timer's one."""
    before = torch.get_num_threads()
    seen = set()
    function = {'a': lambda: (seen.add(torch.get_num_threads()), time.sleep(LONG))}
    try:
        torch.set_num_threads(2)
        interleave(function, rounds=1, warm_up=0)
        assert seen == {2} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
