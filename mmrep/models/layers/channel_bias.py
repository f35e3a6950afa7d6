"""A layer that adds a bias."""

import torch
from torch import Tensor, nn

from mmrep.reparam import LinearConv, register_fold


class ChannelBias(nn.Module):
    """``y = x + bias``, with one bias per channel, initialized to 0.

    Args:
        channels (int): Number of channels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to the same shape."""
        return x + self.bias.view(-1, 1, 1)


@register_fold(ChannelBias)
def _(layer: ChannelBias, partial: LinearConv) -> LinearConv:
    bias = partial.cast(layer.bias)
    return partial.then_scale(torch.ones_like(bias), bias)
