"""Time several functions side by side."""

from collections.abc import Callable, Mapping

import torch
from torch.utils.benchmark import Measurement, Timer

#: A measurement shorter than this many seconds repeats the call until it is not.
_SHORTEST = 0.02


def interleave(
    functions: Mapping[str, Callable[[], object]],
    rounds: int = 15,
    warm_up: int = 2,
) -> dict[str, Measurement]:
    """Time functions in turns, so that other load on the machine affects all alike.

    Every round times each function once, in an order that rotates. On CUDA the timer
    waits for the device. Torch uses as many threads as it is set to.

    Args:
        functions: What to time, by name.
        rounds: How often each is timed. Default: 15.
        warm_up: Untimed calls of each function before. Default: 2.

    Returns:
        The times of each, in seconds per call; with ``median``, ``iqr`` and ``times``.
    """
    # The timer's default is one thread.
    threads = torch.get_num_threads()
    timers = {
        name: Timer('run()', globals={'run': function}, num_threads=threads)
        for name, function in functions.items()
    }
    calls = {}
    for name, function in functions.items():
        for _ in range(warm_up):
            function()
        once = timers[name].timeit(1).median
        calls[name] = max(1, round(_SHORTEST / once))
    names = list(functions)
    measured: dict[str, list[Measurement]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            measured[name].append(timers[name].timeit(calls[name]))
    return {name: Measurement.merge(parts)[0] for name, parts in measured.items()}
