"""The block that is trained to find the scales for RepOptimizer."""

from collections import OrderedDict
from typing import Any

from mmengine.model import Sequential
from torch import nn

from mmrep.registry import MODELS

from .base import ReparamBlock, Size


@MODELS.register_module()
class ScaleSumBlock(ReparamBlock):
    """``y = act(se(norm(s_k conv_kxk(x) + s_1 conv1x1(x) + s_0 x)))``.

    Each ``s`` is a trainable factor for each output channel. The last branch exists only
    where input and output have the same shape. The other arguments are
    :class:`~mmrep.models.blocks.ReparamBlock`'s.

    Source: `Re-parameterizing Your Optimizers rather than Architectures
    <https://arxiv.org/abs/2205.15242>`_, section 3.2 ("hyper-search").

    Args:
        in_channels, out_channels: See the base.
        kernel_size (int | tuple[int, int]): Rows and columns of the kernel. Default: 3.
        scale (float): Initial value of the factors of the convs; those of the input start
            as 1. Default: 1.0.
        **kwargs: The options of :class:`~mmrep.models.blocks.ReparamBlock`, by name.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Size = 3,
        *,
        scale: float = 1.0,
        **kwargs: Any,
    ) -> None:
        self.initial_scale = scale
        super().__init__(in_channels, out_channels, kernel_size, **kwargs)

    def build_branches(self) -> dict[str, nn.Module]:
        scale = self.initial_scale
        branches = {
            'branch_kxk': self._scaled(scale, conv=self.build_conv(self.kernel_size)),
            'branch_1x1': self._scaled(scale, **self.aligned_conv(1)),
        }
        if self.keeps_shape:
            branches['branch_identity'] = self._scaled(1.0)
        return branches

    def build_post_norm(self) -> nn.Module:
        return self.build_norm(self.out_channels)

    def _scaled(self, value: float, **layers: nn.Module) -> Sequential:
        return Sequential(OrderedDict(**layers, scale=self.build_scale(value)))

    def init_scales(self, scale: float) -> None:
        """Set the factors of the convs to ``scale``; in deploy form there are none."""
        for name in self.branch_names[:2]:
            nn.init.constant_(self.get_submodule(name).scale.weight, scale)
