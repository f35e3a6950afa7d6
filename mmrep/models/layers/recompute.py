"""Activation checkpointing that leaves the running statistics right."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmrep.reparam import has_running_statistics


def run_block(
    module: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor, with_cp: bool
) -> Tensor:
    """``function(x)``, with ``with_cp`` computed once more in the backward pass.

    The second computation leaves the running statistics alone, so that they move once
    a step, as without checkpointing.

    Args:
        module: The module whose norms ``function`` uses.
        function: What is computed.
        x: Its input.
        with_cp: Whether to keep only the input until the backward pass.
    """
    if not (with_cp and torch.is_grad_enabled()):
        return function(x)
    return checkpoint(
        function,
        x,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), statistics_kept(module)),
    )


@contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Let no norm inside ``module`` move its running statistics.

    With momentum 0 they are computed with and stay what they are; autograd sees the same
    operations as without.
    """
    norms = [
        norm
        for norm in module.modules()
        if has_running_statistics(norm) and norm.training and hasattr(norm, 'momentum')
    ]
    momenta = [norm.momentum for norm in norms]
    counters = [getattr(norm, 'num_batches_tracked', None) for norm in norms]
    counts = [None if counter is None else counter.clone() for counter in counters]
    try:
        for norm in norms:
            norm.momentum = 0.0
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for counter, count in zip(counters, counts, strict=True):
            if counter is not None:
                counter.copy_(count)
