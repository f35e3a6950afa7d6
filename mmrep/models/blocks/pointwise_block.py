"""The last conv of UniRepLKNet's blocks."""

from typing import Any

from torch import nn

from mmrep.registry import MODELS

from ..layers import ChannelBias
from .base import ReparamBlock, Size, pair


@MODELS.register_module()
class PointwiseBlock(ReparamBlock):
    """``y = act(se(scale norm(conv1x1(x + bias))))``, one conv in deploy form.

    The bias is that of the global response normalisation (GRN) before this block.

    Source: `UniRepLKNet <https://arxiv.org/abs/2311.15599>`_, section 3.1 and its code.

    Args:
        in_channels, out_channels (int): Numbers of channels.
        kernel_size (int | tuple[int, int]): Must be 1. Default: 1.
        padding (int | tuple[int, int]): Must be 0: padded pixels would not get the bias.
            Default: 0.
        layer_scale (float): Initial value of the scale of each channel. Default: 1e-6.
        **kwargs: The options of :class:`~mmrep.models.blocks.ReparamBlock`, by name.

    Raises:
        ValueError: If ``kernel_size`` is not 1 or ``padding`` is not 0.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Size = 1,
        *,
        padding: int | Size = 0,
        layer_scale: float = 1e-6,
        **kwargs: Any,
    ) -> None:
        if (pair(kernel_size), pair(padding)) != ((1, 1), (0, 0)):
            raise ValueError(
                'PointwiseBlock takes only kernel_size=1 and padding=0, not '
                f'kernel_size={kernel_size} and padding={padding}'
            )
        self.layer_scale = layer_scale
        super().__init__(in_channels, out_channels, 1, padding=0, **kwargs)

    def build_branches(self) -> dict[str, nn.Module]:
        branch = self.build_conv_norm(
            self.build_conv(1), shift=ChannelBias(self.in_channels)
        )
        branch.add_module('scale', self.build_scale(self.layer_scale))
        return {'branch_1x1': branch}
