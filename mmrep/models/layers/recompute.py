"""Activation checkpointing that leaves the running statistics right."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def run_block(
    module: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor, with_cp: bool
) -> Tensor:
    """``function(x)``, with ``with_cp`` computed once more in the backward pass.

    The running statistics move once a step, as without checkpointing. Under
    ``torch.compile`` the compiler decides what is kept.

    Args:
        module: The module whose layers ``function`` uses.
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
        context_fn=lambda: (nullcontext(), _LayersAsBefore(module)),
    )


class _LayersAsBefore:
    """A context in which layers have the buffers and modes of when it was made.

    By the time of a second computation norms may have seen other inputs and be in another
    mode. Within, they move copies of their statistics. May be entered any number of
    times, as a graph that is retained may be.
    """

    def __init__(self, module: nn.Module) -> None:
        self._states = [
            (layer, layer.training, _copies(layer._buffers))
            for layer in module.modules()
            if layer._buffers
        ]

    def __enter__(self) -> None:
        self._now = [(layer.training, dict(layer._buffers)) for layer, *_ in self._states]
        for layer, training, buffers in self._states:
            layer.training = training
            layer._buffers.update(_copies(buffers))

    def __exit__(self, *error: Any) -> None:
        for (layer, *_), (training, buffers) in zip(self._states, self._now, strict=True):
            layer.training = training
            layer._buffers.update(buffers)


def _copies(buffers: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    return {key: b.clone() for key, b in buffers.items() if b is not None}


def is_compiling() -> bool:
    """Whether ``torch.compile`` reads the code that asks."""
    if hasattr(torch.compiler, 'is_compiling'):
        return torch.compiler.is_compiling()
    # Before torch 2.3.
    return torch._dynamo.is_compiling()
