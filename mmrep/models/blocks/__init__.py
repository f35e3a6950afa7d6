"""Re-parameterizable blocks: each is its branches, fusing is generic."""

from .base import ReparamBlock
from .conv_norm_block import ConvNormBlock
from .diverse_branch_block import DiverseBranchBlock
from .repvgg_block import RepVGGBlock

__all__ = ['ConvNormBlock', 'DiverseBranchBlock', 'RepVGGBlock', 'ReparamBlock']
