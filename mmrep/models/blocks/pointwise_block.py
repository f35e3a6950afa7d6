"""The last conv of UniRepLKNet's blocks."""

from mmcv.cnn.bricks.scale import LayerScale
from torch import nn

from mmrep.registry import MODELS

from ..layers import ChannelBias
from .base import ReparamBlock


@MODELS.register_module()
class PointwiseBlock(ReparamBlock):
    """``y = act(se(scale norm(conv1x1(x + bias))))``, one conv in deploy form.

    The bias is that of the response normalisation before it.

    Source: `UniRepLKNet <https://arxiv.org/abs/2311.15599>`_, section 3.1 and its code.

    Args:
        in_channels, out_channels (int): Numbers of channels.
        layer_scale (float): What the scales of the channels start with. Default: 1e-6.
        **kwargs: The options of :class:`~mmrep.models.blocks.ReparamBlock`, by name.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, layer_scale: float = 1e-6, **kwargs
    ) -> None:
        self.layer_scale = layer_scale
        super().__init__(in_channels, out_channels, kernel_size=1, **kwargs)

    def build_branches(self) -> dict[str, nn.Module]:
        branch = self.conv_norm(self.build_conv(1), shift=ChannelBias(self.in_channels))
        scale = LayerScale(self.out_channels, data_format='channels_first')
        nn.init.constant_(scale.weight, self.layer_scale)
        branch.add_module('scale', scale)
        return {'branch_1x1': branch}
