"""QARepVGG's block."""

from collections import OrderedDict
from typing import Any

from mmengine.model import Sequential
from torch import nn

from mmrep.registry import MODELS

from ..layers import DilatedAvgPool2d
from .base import ReparamBlock, Size


@MODELS.register_module()
class QARepVGGBlock(ReparamBlock):
    """``y = act(se(norm(norm(conv_kxk(x)) + conv1x1(x) + x)))``: a norm after the sum.

    The 1x1 conv and the identity have no norm of their own, so that the equivalent kernel
    has a small variance, which int8 needs. The identity is a branch only where input and
    output have the same shape. SE follows the last norm; in the official code it is between
    the sum and the norm, where the block could not be fused to one conv followed by SE. The
    other arguments are :class:`~mmrep.models.blocks.ReparamBlock`'s.

    Source: `Make RepVGG Greater Again: A Quantization-aware Approach
    <https://arxiv.org/abs/2212.01593>`_, section 3.3 and figure 4.

    Args:
        in_channels, out_channels: See the base.
        kernel_size (int | tuple[int, int]): Rows and columns of the kernel. Default: 3.
        average (bool): Whether blocks with an identity have a branch of average pooling,
            too, as in YOLOv6. Default: False.
        **kwargs: The options of :class:`~mmrep.models.blocks.ReparamBlock`, by name.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Size = 3,
        *,
        average: bool = False,
        **kwargs: Any,
    ) -> None:
        self.average = average
        super().__init__(in_channels, out_channels, kernel_size, **kwargs)

    def build_branches(self) -> dict[str, nn.Module]:
        branches = {
            'branch_kxk': self.build_conv_norm(self.build_conv(self.kernel_size)),
            'branch_1x1': Sequential(OrderedDict(self.aligned_conv(1))),
        }
        if self.keeps_shape:
            branches['branch_identity'] = nn.Identity()
            if self.average:
                branches['branch_avg'] = DilatedAvgPool2d(self.geometry)
        return branches

    def build_post_norm(self) -> nn.Module:
        return self.build_norm(self.out_channels)
