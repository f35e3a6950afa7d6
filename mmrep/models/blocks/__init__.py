"""Re-parameterizable blocks: each defines its branches, fusing is generic."""

from .asymmetric_conv_block import AsymmetricConvBlock
from .base import ReparamBlock
from .branch_block import BranchBlock
from .conv_norm_block import ConvNormBlock
from .diverse_branch_block import DiverseBranchBlock
from .large_kernel_block import DilatedReparamBlock, LargeKernelBlock
from .mobileone_block import MobileOneBlock
from .orepa_block import OREPABlock, OREPARepVGGBlock
from .pointwise_block import PointwiseBlock
from .qarepvgg_block import QARepVGGBlock
from .repvgg_block import RepVGGBlock
from .scale_sum_block import ScaleSumBlock

__all__ = [
    'AsymmetricConvBlock',
    'BranchBlock',
    'ConvNormBlock',
    'DilatedReparamBlock',
    'DiverseBranchBlock',
    'LargeKernelBlock',
    'MobileOneBlock',
    'OREPABlock',
    'OREPARepVGGBlock',
    'PointwiseBlock',
    'QARepVGGBlock',
    'RepVGGBlock',
    'ReparamBlock',
    'ScaleSumBlock',
]
