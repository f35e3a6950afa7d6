"""Blocks of four papers as a user would write them: branches, and nothing of the core."""

from collections import OrderedDict

from torch import nn

from mmrep.models.blocks import ReparamBlock


class AsymmetricBlock(ReparamBlock):
    """ACNet's: a kxk conv, and its middle column and row once more.

    Source: `ACNet <https://arxiv.org/abs/1908.03930>`_, figure 1.
    """

    def build_branches(self):
        rows, columns = self.kernel_size
        return {
            'branch_square': self.conv_norm(self.build_conv(self.kernel_size)),
            'branch_ver': self.conv_norm(**self.aligned_conv((rows, 1))),
            'branch_hor': self.conv_norm(**self.aligned_conv((1, columns))),
        }


class MobileOneBlock(ReparamBlock):
    """MobileOne's: kxk convs in a list, a 1x1 conv, and a norm where the shape stays.

    Source: `MobileOne <https://arxiv.org/abs/2206.04040>`_, figure 3.
    """

    def __init__(self, *args, num_convs=2, **kwargs):
        self.num_convs = num_convs
        super().__init__(*args, **kwargs)

    def build_branches(self):
        branches = {
            f'branch_conv_list.{i}': self.conv_norm(self.build_conv(self.kernel_size))
            for i in range(self.num_convs)
        }
        branches['branch_scale'] = self.conv_norm(**self.aligned_conv(1))
        if self.keeps_shape:
            branches['branch_norm'] = self.build_norm(self.in_channels)
        return branches


class QARepVGGBlock(ReparamBlock):
    """QARepVGG's: a norm after the sum, none after the 1x1 conv and the identity.

    Source: `QARepVGG <https://arxiv.org/abs/2212.01593>`_, figure 4.
    """

    def build_branches(self):
        branches = {
            'branch_3x3': self.conv_norm(self.build_conv(self.kernel_size)),
            'branch_1x1': nn.Sequential(OrderedDict(self.aligned_conv(1))),
        }
        if self.keeps_shape:
            branches['branch_identity'] = nn.Identity()
        return branches

    def build_post_norm(self):
        return self.build_norm(self.out_channels)


class DilatedReparamBlock(ReparamBlock):
    """UniRepLKNet's: a large kernel, and dilated ones that lie on its taps.

    Source: `UniRepLKNet <https://arxiv.org/abs/2311.15599>`_, section 3.1.
    """

    #: Kernel sizes and dilations beside each large kernel.
    others = {5: ((3, 1), (3, 2)), 7: ((5, 1), (3, 2), (3, 3))}

    def build_branches(self):
        branches = {'branch_large': self.conv_norm(self.build_conv(self.kernel_size))}
        for size, spread in self.others[self.kernel_size[0]]:
            dilation = tuple(spread * apart for apart in self.dilation)
            conv = self.aligned_conv(size, dilation)
            branches[f'branch_k{size}_{spread}'] = self.conv_norm(**conv)
        return branches
