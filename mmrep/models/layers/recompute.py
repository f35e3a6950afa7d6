"""Activation checkpointing that leaves the running statistics right."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
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
    again = _Again(module)
    out = checkpoint(
        function, x, use_reentrant=False, context_fn=lambda: (nullcontext(), again)
    )
    again.remember()
    return out


class _Again:
    """The context of every further computation: the norms as the first one left them.

    By then they may have seen other inputs and be in another mode. May be entered any
    number of times, as a graph that is retained may be.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._states: list[tuple[nn.Module, tuple]] = []

    def remember(self) -> None:
        """Keep the norms' modes and running statistics."""
        for norm in filter(has_running_statistics, self._module.modules()):
            statistics = norm.running_mean, norm.running_var
            if norm.training:
                statistics = tuple(tensor.clone() for tensor in statistics)
            self._states.append((norm, (norm.training, *statistics)))

    def __enter__(self) -> None:
        self._swap()
        self._statistics_kept = statistics_kept(self._module)
        self._statistics_kept.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._statistics_kept.__exit__(*error)
        self._swap()

    def _swap(self) -> None:
        """Exchange what the norms have for what is kept."""
        for index, (norm, state) in enumerate(self._states):
            own = norm.training, norm.running_mean, norm.running_var
            self._states[index] = norm, own
            norm.training, norm.running_mean, norm.running_var = state


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


class MadeAgain(saved_tensors_hooks):
    """A context in which chosen tensors are not kept for the backward pass.

    Where an operation would keep one of them, it keeps what makes it again, from other
    tensors that are kept anyway.
    """

    def __init__(self) -> None:
        self._makers: dict[int, Callable[[], Tensor]] = {}
        super().__init__(self._pack, self._unpack)

    @staticmethod
    def is_possible() -> bool:
        """Whether there can be such a context: in transforms of ``torch.func``, not."""
        return torch._C._autograd._saved_tensors_hooks_is_enabled()

    def replace(self, tensor: Tensor, make: Callable[[], Tensor]) -> None:
        """Keep ``make`` for ``tensor``, which has to live until the context ends.

        Args:
            tensor: The tensor.
            make: Makes it again; called without gradients, any number of times.
        """
        self._makers[tensor.data_ptr()] = make

    def _pack(self, tensor: Tensor) -> Tensor | Callable[[], Tensor]:
        # What an operation keeps is an alias of the tensor, not the tensor itself.
        make = self._makers.get(tensor.data_ptr())
        return tensor if make is None or not tensor.numel() else make

    @staticmethod
    def _unpack(kept: Tensor | Callable[[], Tensor]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            return kept()


def is_compiling() -> bool:
    """Whether ``torch.compile`` reads the code that asks."""
    if hasattr(torch.compiler, 'is_compiling'):
        return torch.compiler.is_compiling()
    # Before torch 2.3.
    return torch._dynamo.is_compiling()
