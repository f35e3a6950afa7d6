"""Measure the memory that a function takes."""

import warnings
from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def peak_memory(function: Callable[[], object], device: str = 'cpu') -> int:
    """The most bytes of tensors that ``function()`` holds at once.

    What was allocated before the call does not count; what a call leaves behind does.
    On a CPU it is what torch's allocator was asked for, which is the same in every run.

    Args:
        function: What to measure.
        device: The device that it computes on. Default: ``'cpu'``.
    """
    if torch.device(device).type == 'cuda':
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    return max(_bytes_held(function)[0])


def kept_memory(function: Callable[[], Tensor]) -> int:
    """The bytes that stay allocated for the backward pass of ``function()``, on a CPU.

    They are what the call has allocated and not freed when it returns. The result's own
    bytes do not count. An input counts if it is kept, provided that the function makes
    it: ``lambda: model(x.clone())``.
    """
    held, result = _bytes_held(function)
    return held[-1] - result.untyped_storage().nbytes()


def _bytes_held(function: Callable[[], object]) -> tuple[list[int], object]:
    """Bytes held after each allocation and release, and what ``function`` returned."""
    with warnings.catch_warnings():
        # The profiler warns that it keeps one cycle, which is all there is.
        warnings.simplefilter('ignore')
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            result = function()
    events = profiler.profiler.kineto_results.events()
    changes = [event.nbytes() for event in events if event.name() == '[memory]']
    return list(accumulate(changes, initial=0)), result
