"""Set running statistics to those of the norms' inputs without changing the function."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class _Moments:
    """Sums of a norm's inputs and of their squares per channel, in float64."""

    def __init__(self) -> None:
        self.count = self.sum = self.squares = 0

    def __call__(self, norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Forward pre-hook."""
        x = args[0].double().transpose(0, 1).flatten(1)
        self.count += x.shape[1]
        self.sum = self.sum + x.sum(1)
        self.squares = self.squares + x.square().sum(1)

    @property
    def mean(self) -> Tensor:
        return self.sum / self.count

    @property
    def variance(self) -> Tensor:
        """The unbiased variance, as in a batch norm's ``running_var``."""
        centred = self.squares - self.count * self.mean.square()
        return centred.clamp(min=0) / max(1, self.count - 1)


@torch.no_grad()
def measure_norms(model: nn.Module, run: Callable[[], object]) -> int:
    """Set running statistics to those of the norms' inputs without changing the function.

    For a norm ``y = gamma (x - mean) / sqrt(var + eps) + beta``, mean and variance become
    those of all ``x`` that it reads in ``run()``, and gamma and beta compensate for that::

        gamma' = gamma sqrt(var' + eps) / sqrt(var + eps)
        beta' = beta + gamma (mean' - mean) / sqrt(var + eps)

    In eval mode the model computes what it did before; in train mode, where norms use
    batch statistics, it now computes about the same. Do this to a network that was fused
    with ``keep_norm=True`` before training it further.

    Args:
        model: The model. Its batch norms with running statistics, gamma and beta are
            measured, in eval mode.
        run: Calls the model on training data.

    Returns:
        The number of norms that were measured.
    """
    moments = {
        norm: _Moments()
        for norm in model.modules()
        if isinstance(norm, _BatchNorm) and norm.affine and norm.track_running_stats
    }
    handles = [norm.register_forward_pre_hook(seen) for norm, seen in moments.items()]
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    measured = {norm: seen for norm, seen in moments.items() if seen.count}
    for norm, seen in measured.items():
        before = (norm.running_var.double() + norm.eps).sqrt()
        scale = norm.weight / before
        norm.bias.copy_(norm.bias + scale * (seen.mean - norm.running_mean))
        norm.weight.copy_(scale * (seen.variance + norm.eps).sqrt())
        norm.running_mean.copy_(seen.mean)
        norm.running_var.copy_(seen.variance)
    return len(measured)
