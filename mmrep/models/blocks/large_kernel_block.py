"""Blocks with a large kernel: RepLKNet's, RepViT's and UniRepLKNet's."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from mmrep.registry import MODELS

from .base import ReparamBlock, Size

#: Kernel sizes and dilations of the convs beside a large kernel, by its size: UniRepLKNet,
#: section 3.1 and its code.
DILATED_KERNELS = {
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    7: ((5, 1), (3, 2), (3, 3)),
    5: ((3, 1), (3, 2)),
}


@MODELS.register_module()
class LargeKernelBlock(ReparamBlock):
    """``y = act(se(norm(conv_KxK(x)) + norm(conv_kxk(x))))``: a large and a small kernel.

    With K = 31 and k = 5 it is RepLKNet's block, with K = 7 and k = 3 that of RepViT and
    Ultralytics. The state-dict keys are those of mmpretrain's ``ReparamLargeKernelConv``.
    The other arguments are :class:`~mmrep.models.blocks.ReparamBlock`'s.

    Source: `Scaling Up Your Kernels to 31x31 <https://arxiv.org/abs/2203.06717>`_, section
    3, guideline 3.

    Args:
        in_channels, out_channels, kernel_size: See the base.
        small_kernel (int | tuple[int, int], optional): Rows and columns of the small
            kernel; None for none. Default: 5.
        **kwargs: The options of :class:`~mmrep.models.blocks.ReparamBlock`, by name.

    Raises:
        ValueError: If the small kernel does not fit into the large one.
    """

    norm_name, reparam_name = 'bn', 'lkb_reparam'

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Size,
        *,
        small_kernel: int | Size | None = 5,
        **kwargs: Any,
    ) -> None:
        self.small_kernel = small_kernel
        super().__init__(in_channels, out_channels, kernel_size, **kwargs)

    def build_branches(self) -> dict[str, nn.Module]:
        branches = {'lkb_origin': self.build_conv_norm(self.build_conv(self.kernel_size))}
        if self.small_kernel is not None:
            small = self.aligned_conv(self.small_kernel)
            branches['small_conv'] = self.build_conv_norm(**small)
        return branches


@MODELS.register_module()
class DilatedReparamBlock(ReparamBlock):
    """``y = act(se(post_norm(norm(conv_KxK(x)) + sum norm(conv_kxk(x, dilation=r)))))``.

    A large kernel and small dilated ones on its taps; depthwise in the paper, with any
    groups and stride here. The block's own dilation multiplies those of the small kernels.
    The other arguments are :class:`~mmrep.models.blocks.ReparamBlock`'s.

    Source: `UniRepLKNet <https://arxiv.org/abs/2311.15599>`_, section 3.1 and figure 2.

    Args:
        in_channels, out_channels: See the base.
        kernel_size (int | tuple[int, int]): Rows and columns of the kernel; 5, 7, 9, 11,
            13, 15 or 17, or any with ``kernels``.
        kernels (Sequence[tuple[int, int]], optional): Kernel size and dilation of each
            small conv. Default: None, the paper's.
        post_norm (bool): Whether a norm follows the sum, as in UniRepLKNet.
            Default: False.
        **kwargs: The options of :class:`~mmrep.models.blocks.ReparamBlock`, by name.

    Raises:
        ValueError: If the paper has no small kernels for this size, or one does not fit.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Size,
        *,
        kernels: Sequence[tuple[int, int]] | None = None,
        post_norm: bool = False,
        **kwargs: Any,
    ) -> None:
        if kernels is None:
            size = kernel_size if isinstance(kernel_size, int) else kernel_size[0]
            if size not in DILATED_KERNELS or kernel_size not in (size, (size, size)):
                raise ValueError(
                    f'no dilated kernels are known for kernel_size={kernel_size}: give '
                    f'kernels, or choose from {", ".join(map(str, DILATED_KERNELS))}'
                )
            kernels = DILATED_KERNELS[size]
        self.kernels = tuple(kernels)
        self.ends_with_norm = post_norm
        super().__init__(in_channels, out_channels, kernel_size, **kwargs)

    def build_branches(self) -> dict[str, nn.Module]:
        branches = {'branch_large': self.build_conv_norm(self.build_conv(self.kernel_size))}
        for size, spread in self.kernels:
            dilation = tuple(spread * apart for apart in self.dilation)
            conv = self.aligned_conv(size, dilation)
            branches[f'branch_k{size}_d{spread}'] = self.build_conv_norm(**conv)
        return branches

    def build_post_norm(self) -> nn.Module | None:
        return self.build_norm(self.out_channels) if self.ends_with_norm else None
