"""Draw the branches of every block into docs/images/blocks."""

from pathlib import Path

from mmrep.analysis import draw_block
from mmrep.models import blocks

OUT = Path(__file__).resolve().parent / 'images' / 'blocks'

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


if __name__ == '__main__':
    main()
