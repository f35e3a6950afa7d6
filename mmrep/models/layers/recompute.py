"""Activation checkpointing that leaves the running statistics right."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmrep.reparam import has_running_statistics


def run_block(
    module: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor, with_cp: bool
) -> Tensor:
    """``function(x)``, with ``with_cp`` computed once more in the backward pass.

    The running statistics move once a step, as without checkpointing. Under
    ``torch.compile`` the compiler decides what is kept.

    Args:
        module: The module whose norms ``function`` uses.
        function: What is computed.
        x: Its input.
        with_cp: Whether to keep only the input until the backward pass.
    """
    if not (with_cp and torch.is_grad_enabled()) or is_compiling():
        return function(x)
    return checkpoint(
        function,
        x,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), _NormsAsBefore(module)),
    )


class _NormsAsBefore:
    """A context in which norms are as they were when it was made.

    By the time of a second computation they may have seen other inputs and be in another
    mode. Within, they move copies of their statistics. May be entered any number of
    times, as a graph that is retained may be.
    """

    def __init__(self, module: nn.Module) -> None:
        self._states = [
            (
                norm,
                norm.training,
                {k: v.clone() for k, v in norm._buffers.items() if v is not None},
            )
            for norm in module.modules()
            if has_running_statistics(norm)
        ]

    def __enter__(self) -> None:
        self._now = [(norm.training, dict(norm._buffers)) for norm, *_ in self._states]
        for norm, training, buffers in self._states:
            norm.training = training
            norm._buffers.update((key, value.clone()) for key, value in buffers.items())

    def __exit__(self, *error: Any) -> None:
        for (norm, *_), (training, buffers) in zip(self._states, self._now, strict=True):
            norm.training = training
            norm._buffers.update(buffers)


def is_compiling() -> bool:
    """Whether ``torch.compile`` reads the code that asks."""
    if hasattr(torch.compiler, 'is_compiling'):
        return torch.compiler.is_compiling()
    # Before torch 2.3.
    return torch._dynamo.is_compiling()
