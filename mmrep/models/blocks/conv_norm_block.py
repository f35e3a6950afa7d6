"""The block with one branch: what a plain network is made of."""

from torch import nn

from mmrep.registry import MODELS

from .base import ReparamBlock


@MODELS.register_module()
class ConvNormBlock(ReparamBlock):
    """``y = act(se(norm(conv(x))))``, one conv in deploy form.

    A body whose ``block_cfg`` has this type is the plain network. The arguments are
    :class:`~mmrep.models.blocks.ReparamBlock`'s.
    """

    def build_branches(self) -> dict[str, nn.Module]:
        return {'branch_kxk': self.build_conv_norm(self.build_conv(self.kernel_size))}

    def conv_norm_form(self) -> ReparamBlock:
        """The block itself in train form, which is one conv and one norm already."""
        return super().conv_norm_form() if self.deploy else self
