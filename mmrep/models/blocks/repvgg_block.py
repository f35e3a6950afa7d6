"""RepVGG's block."""

from typing import Any

from torch import nn

from mmrep.registry import MODELS

from .base import ReparamBlock, Size, pair


@MODELS.register_module()
class RepVGGBlock(ReparamBlock):
    """``y = act(se(norm(conv3x3(x)) + norm(conv1x1(x)) + norm(x)))``.

    The last branch, the identity, exists only where input and output have the same shape.
    The arguments are mmpretrain's, with its defaults and meaning; the other arguments are
    :class:`~mmrep.models.blocks.ReparamBlock`'s.

    Source: `RepVGG: Making VGG-style ConvNets Great Again
    <https://arxiv.org/abs/2101.03697>`_, section 3.2 and figure 4.

    Args:
        in_channels, out_channels, stride, dilation, groups, padding_mode: See the base.
        padding (int | tuple[int, int]): Padding of the 3x3 conv, in pixels. Default: 1.
        kernel_size (int): Must be 3; for bodies, which pass it to every block. Default: 3.
        **kwargs: The options of :class:`~mmrep.models.blocks.ReparamBlock`, by name.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int | Size = 1,
        padding: int | Size = 1,
        dilation: int | Size = 1,
        groups: int = 1,
        padding_mode: str = 'zeros',
        *,
        kernel_size: int | Size = 3,
        **kwargs: Any,
    ) -> None:
        if pair(kernel_size) != (3, 3):
            raise ValueError(f'RepVGGBlock takes only kernel_size=3, not {kernel_size}')
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            padding_mode=padding_mode,
            **kwargs,
        )

    def build_branches(self) -> dict[str, nn.Module]:
        branches = {
            'branch_3x3': self.build_conv_norm(self.build_conv(3)),
            'branch_1x1': self.build_conv_norm(**self.aligned_conv(1)),
        }
        if self.keeps_shape:
            branches['branch_norm'] = self.build_norm(self.in_channels)
        return branches
