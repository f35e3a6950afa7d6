"""The first conv of DBB's 1x1-kxk branch."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmrep.registry import MODELS
from mmrep.reparam import (
    ConvGeometry,
    LinearConv,
    identity_kernel,
    register_fold,
    weight_in_eval_mode,
)


@MODELS.register_module()
class IdentityConv1x1(nn.Module):
    """A 1x1 conv that starts as the identity: ``y = conv(x, I + W)``, ``W = 0`` at first.

    It is not an ``nn.Conv2d``, so that an ``init_cfg`` for ``Conv2d`` does not change it.

    Source: DBB, section 4.1 ("we initialize it as identity").

    Args:
        channels (int): Number of input and output channels.
        groups (int): Number of groups. Default: 1.
    """

    def __init__(self, channels: int, groups: int = 1) -> None:
        super().__init__()
        self.channels = channels
        self.groups = groups
        self.weight = nn.Parameter(torch.zeros(channels, channels // groups, 1, 1))

    def kernel(self, weight: Tensor) -> Tensor:
        """The conv's kernel ``I + W``, ``(channels, channels / groups, 1, 1)``."""
        # Created at each call, not kept as a buffer: that costs a fraction of the conv, and
        # there is no state that .half(), a meta device or a copy could lose.
        return weight + identity_kernel(
            self.channels, self.groups, weight.dtype, weight.device
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(N, channels, H, W)`` to the same shape."""
        return F.conv2d(x, self.kernel(self.weight), groups=self.groups)

    def extra_repr(self) -> str:
        return f'{self.channels}, groups={self.groups}'


@register_fold(IdentityConv1x1)
def _(layer: IdentityConv1x1, partial: LinearConv) -> LinearConv:
    geometry = ConvGeometry(layer.channels, layer.channels, (1, 1), groups=layer.groups)
    return partial.then_conv(layer.kernel(weight_in_eval_mode(layer)), None, geometry)
