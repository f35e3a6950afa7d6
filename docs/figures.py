"""Draw the pictures of the documentation into docs/images.

python docs/figures.py                 # the branches of every block
python docs/figures.py CONFIG CKPT     # the kernels of a trained RepVGG's block
"""

import sys
from pathlib import Path

from mmrep.analysis import draw_block, draw_branch_kernels
from mmrep.checkpoints import load_strictly, read_checkpoint, state_dict_of
from mmrep.deployment import build_model, read_config
from mmrep.models import blocks

IMAGES = Path(__file__).resolve().parent / 'images'
OUT = IMAGES / 'blocks'

#: Each as its paper has it, with as many channels in as out, which has all branches.
DRAWN = {
    'repvgg': lambda: blocks.RepVGGBlock(8, 8),
    'dbb': lambda: blocks.DiverseBranchBlock(8, 8, 3, act_cfg=dict(type='ReLU')),
    'acb': lambda: blocks.AsymmetricConvBlock(8, 8, 3, act_cfg=dict(type='ReLU')),
    'mobileone': lambda: blocks.MobileOneBlock(8, 8, 3, num_convs=4, groups=8),
    'qarepvgg': lambda: blocks.QARepVGGBlock(8, 8, 3),
    'orepa': lambda: blocks.OREPABlock(8, 8, 3, act_cfg=dict(type='ReLU')),
    'orepa-repvgg': lambda: blocks.OREPARepVGGBlock(8, 8, 3),
    'dilated-reparam': lambda: blocks.DilatedReparamBlock(
        8, 8, 13, groups=8, post_norm=True, act_cfg=None
    ),
    'large-kernel': lambda: blocks.LargeKernelBlock(8, 8, 31, groups=8),
    'scale-sum': lambda: blocks.ScaleSumBlock(8, 8, 3),
    'branches': lambda: blocks.BranchBlock(
        8, 8, 3, branches=['3x3', '1x1', '1x3', '3x1', 'avg', 'identity']
    ),
}


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    for name, build in DRAWN.items():
        draw_block(build(), OUT / f'{name}.svg')


def draw_trained(config: str, checkpoint: str) -> None:
    """Draw the kernels of a block in a classifier with RepVGG that was trained."""
    model = build_model(read_config(config))
    load_strictly(model, state_dict_of(read_checkpoint(checkpoint), checkpoint), checkpoint)
    draw_branch_kernels(model.eval().backbone.stage_3[1], IMAGES / 'kernels.png')


if __name__ == '__main__':
    draw_trained(*sys.argv[1:]) if sys.argv[1:] else main()
