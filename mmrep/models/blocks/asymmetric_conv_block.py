"""The Asymmetric Convolution Block."""

from typing import Any

from torch import nn

from mmrep.registry import MODELS

from .base import ReparamBlock, Size


@MODELS.register_module()
class AsymmetricConvBlock(ReparamBlock):
    """``y = norm(conv_kxk(x)) + norm(conv_kx1(x)) + norm(conv_1xk(x))``.

    A drop-in for a kxk conv and its norm. The kx1 and the 1xk kernel lie on the middle
    column and the middle row of the kxk kernel. If the kxk kernel has a single column or
    row, the one of them that would have its shape is left out. The other arguments are
    :class:`~mmrep.models.blocks.ReparamBlock`'s.

    Source: `ACNet: Strengthening the Kernel Skeletons for Powerful CNN via Asymmetric
    Convolution Blocks <https://arxiv.org/abs/1908.03930>`_, section 3 and figure 1.

    Args:
        in_channels, out_channels: See the base.
        kernel_size (int | tuple[int, int]): Rows and columns of the kernel. Default: 3.
        act_cfg (dict, optional): Config of the activation. Default: None, none.
        **kwargs: The options of :class:`~mmrep.models.blocks.ReparamBlock`, by name.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Size = 3,
        *,
        act_cfg: dict | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, act_cfg=act_cfg, **kwargs)

    def build_branches(self) -> dict[str, nn.Module]:
        rows, columns = self.kernel_size
        branches = {'branch_kxk': self.build_conv_norm(self.build_conv(self.kernel_size))}
        if columns > 1:
            branches['branch_kx1'] = self.build_conv_norm(**self.aligned_conv((rows, 1)))
        if rows > 1:
            branches['branch_1xk'] = self.build_conv_norm(**self.aligned_conv((1, columns)))
        return branches
