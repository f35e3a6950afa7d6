"""MobileOne's block."""

from typing import Any

from torch import nn

from mmrep.registry import MODELS

from .base import ReparamBlock, Size


@MODELS.register_module()
class MobileOneBlock(ReparamBlock):
    """``y = act(se(sum_n norm(conv_kxk_n(x)) + norm(conv1x1(x)) + norm(x)))``.

    A block with a 1x1 kernel has no extra 1x1 branch ("scale"). The identity is a branch
    only where input and output have the same shape. The arguments and the state-dict keys
    are mmpretrain's; the other arguments are :class:`~mmrep.models.blocks.ReparamBlock`'s.

    Source: `MobileOne: An Improved One millisecond Mobile Backbone
    <https://arxiv.org/abs/2206.04040>`_, section 3.2 and figure 3.

    Args:
        in_channels, out_channels, stride, dilation, groups: See the base.
        kernel_size (int | tuple[int, int]): Rows and columns of the kernel. Default: 3.
        num_convs (int): Number N of kxk branches. Default: 1.
        padding (int | tuple[int, int], optional): Padding, in pixels. Default: None, the
            padding that keeps the size at stride 1.
        **kwargs: The options of :class:`~mmrep.models.blocks.ReparamBlock`, by name.

    Raises:
        ValueError: If ``num_convs`` is less than 1.
    """

    se_name = 'se'

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Size = 3,
        num_convs: int = 1,
        stride: int | Size = 1,
        padding: int | Size | None = None,
        dilation: int | Size = 1,
        groups: int = 1,
        **kwargs: Any,
    ) -> None:
        if num_convs < 1:
            raise ValueError(f'num_convs must be at least 1, not {num_convs}')
        self.num_convs = num_convs
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            **kwargs,
        )

    def build_branches(self) -> dict[str, nn.Module]:
        branches = {
            f'branch_conv_list.{n}': self.build_conv_norm(self.build_conv(self.kernel_size))
            for n in range(self.num_convs)
        }
        if self.kernel_size != (1, 1):
            branches['branch_scale'] = self.build_conv_norm(**self.aligned_conv(1))
        if self.keeps_shape:
            branches['branch_norm'] = self.build_norm(self.in_channels)
        return branches
