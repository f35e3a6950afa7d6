"""Measure the memory that a function takes."""

import warnings
from collections.abc import Callable

import torch
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
    with warnings.catch_warnings():
        # That it keeps one cycle, which is all there is.
        warnings.simplefilter('ignore')
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            function()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == '[memory]':
            held += event.nbytes()
            peak = max(peak, held)
    return peak
