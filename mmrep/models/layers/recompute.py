"""Activation checkpointing that updates running statistics only once."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def run_block(
    module: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor, with_cp: bool
) -> Tensor:
    """Compute ``function(x)``; with ``with_cp``, recompute it in the backward pass.

    The running statistics are updated once per step, as without checkpointing. Under
    ``torch.compile``, ``with_cp`` is ignored, and the compiler decides what is kept.

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
    """A context that restores buffers, and the modes of their layers, as at its creation.

    By the time of the recomputation, norms may have seen other inputs and be in another
    mode. Within the context they update copies of their statistics. It can be entered any
    number of times, as a retained graph can be recomputed any number of times.
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
    """Whether the calling code is being compiled by ``torch.compile``."""
    if hasattr(torch.compiler, 'is_compiling'):
        return torch.compiler.is_compiling()
    # Before torch 2.3.
    return torch._dynamo.is_compiling()
