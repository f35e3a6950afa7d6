"""The block with one branch: what a plain network is made of."""

from torch import nn

from mmrep.registry import MODELS

from .base import ReparamBlock


@MODELS.register_module()
class ConvNormBlock(ReparamBlock):
    """``y = act(se(norm(conv(x))))``, one conv in deploy form.

    In the place of another block it turns a body into its plain network. The arguments
    are :class:`~mmrep.models.blocks.ReparamBlock`'s.
    """

    branch_names = ('branch_kxk',)

    def build_branches(self, main_conv: nn.Module) -> None:
        self.branch_kxk = self.conv_norm(main_conv)
