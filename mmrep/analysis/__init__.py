"""Show what the branches of a trained model do."""

from .branches import BranchReport, analyze_branches, write_table
from .diagram import branch_boxes, draw_block
from .pictures import draw_branch_kernels, draw_kernels, draw_shares

__all__ = [
    'BranchReport',
    'analyze_branches',
    'branch_boxes',
    'draw_block',
    'draw_branch_kernels',
    'draw_kernels',
    'draw_shares',
    'write_table',
]
