"""Draw the pictures of the documentation into docs/images.

python docs/figures.py                 # the branches of every block
python docs/figures.py CONFIG CKPT     # of a trained network: the kernels of a
                                       # classifier's block, a segmentor's predictions
"""

import copy
import sys
from pathlib import Path

import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS
from torch import nn

from mmrep.analysis import draw_block, draw_branch_kernels
from mmrep.checkpoints import load_strictly, read_checkpoint, state_dict_of
from mmrep.deployment import build_model, read_config
from mmrep.models import blocks
from mmrep.reparam import branch_by_branch, switch_to_deploy

IMAGES = Path(__file__).resolve().parent / 'images'
OUT = IMAGES / 'blocks'

#: The blocks of the papers, with as many channels in as out, so that all branches exist.
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
    """Draw a segmentor's predictions, or the kernels of a classifier's block."""
    cfg = read_config(config)
    model = build_model(cfg)
    load_strictly(model, state_dict_of(read_checkpoint(checkpoint), checkpoint), checkpoint)
    model.eval()
    if hasattr(model, 'decode_head'):
        draw_segmentations(cfg, model)
    else:
        draw_branch_kernels(model.backbone.stage_3[1], IMAGES / 'kernels.png')


@torch.no_grad()
def draw_segmentations(cfg: Config, model: nn.Module, count: int = 4) -> None:
    """Draw validation images, the classes predicted in both forms, and the difference."""
    dataset = DATASETS.build(cfg.val_dataloader.dataset)
    batch = pseudo_collate([dataset[i] for i in range(count)])
    inputs = model.data_preprocessor(batch)
    # Predictions are written into the samples.
    with branch_by_branch(model):
        train = model(**copy.deepcopy(inputs), mode='predict')
    switch_to_deploy(model)
    deploy = model(**inputs, mode='predict')
    palette = ListedColormap([[v / 255 for v in c] for c in dataset.metainfo['palette']])
    figure = Figure(figsize=(8, 2 * count), layout='constrained')
    titles = ('image', 'train form', 'deploy form', 'logits: difference / largest')
    for row, axes in enumerate(figure.subplots(count, 4)):
        logits = [form[row].seg_logits.data for form in (train, deploy)]
        error = (logits[0] - logits[1]).abs().amax(0) / logits[0].abs().max()
        axes[0].imshow(batch['inputs'][row].permute(1, 2, 0).flip(2))
        for k, form in enumerate((train, deploy), start=1):
            style = dict(cmap=palette, vmin=0, vmax=palette.N - 1, interpolation='none')
            axes[k].imshow(form[row].pred_sem_seg.data[0], **style)
        drawn = axes[3].imshow(error, cmap='magma', vmin=0, vmax=1e-6)
        for title, each in zip(titles, axes, strict=True):
            each.set_title(title if row == 0 else '', fontsize=9)
            each.set_axis_off()
        figure.colorbar(drawn, ax=axes[3], shrink=0.8)
    figure.savefig(IMAGES / 'segmentations.png', dpi=110)


if __name__ == '__main__':
    draw_trained(*sys.argv[1:]) if sys.argv[1:] else main()
