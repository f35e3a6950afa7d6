"""The fold law over generated geometries: every block is the one conv that it becomes."""

import random

import pytest
import torch
from geometries import CHANNELS, PADDING_MODES, padding_and_size, span
from laws import assert_deploy_equivalent, assert_same, image

from mmrep.models.blocks import (
    AsymmetricConvBlock,
    BranchBlock,
    ConvNormBlock,
    DilatedReparamBlock,
    DiverseBranchBlock,
    LargeKernelBlock,
    MobileOneBlock,
    OREPABlock,
    OREPARepVGGBlock,
    QARepVGGBlock,
    RepVGGBlock,
)
from mmrep.reparam import branch_by_branch

#: The blocks in turn, with the kernel sizes that they have; None: any.
BLOCKS = (
    (RepVGGBlock, (3,)),
    (DiverseBranchBlock, None),
    (ConvNormBlock, None),
    (AsymmetricConvBlock, None),
    (MobileOneBlock, None),
    (QARepVGGBlock, None),
    (DilatedReparamBlock, (5, 7, 9, 11, 13, 15, 17)),
    (LargeKernelBlock, (5, 7, 31)),
    (OREPABlock, None),
    (OREPARepVGGBlock, None),
    (BranchBlock, None),
)
NORMS = (
    dict(type='BN'),
    dict(type='BN', affine=False),
    dict(type='BN', eps=0.1, requires_grad=False),
    dict(type='SyncBN'),
    dict(type='IN', affine=True, track_running_stats=True),
)
ACTS = (None, dict(type='ReLU'), dict(type='LeakyReLU'), dict(type='GELU'))
SE = (
    dict(),
    dict(se_cfg=dict(ratio=2, divisor=1)),
    dict(se_cfg=dict(ratio=2, divisor=1), se_position='after_act'),
)


def draw(seed: int) -> tuple[type, dict, tuple[int, int]]:
    """A type of block, its arguments, and the size of an input in pixels."""
    choose = random.Random(seed)
    kind, kernels = BLOCKS[seed % len(BLOCKS)]
    if kernels is None:
        kernel_size = choose.randint(1, 7), choose.randint(1, 7)
    else:
        kernel_size = (choose.choice(kernels),) * 2
    stride, dilation = ((choose.randint(1, 3), choose.randint(1, 3)) for _ in range(2))
    ins, outs, groups = choose.choice(CHANNELS)
    padding_mode = choose.choice(PADDING_MODES)
    conv_type = choose.choice((None, 'Conv', 'Conv2dAdaptivePadding'))
    if conv_type == 'Conv2dAdaptivePadding' and (
        padding_mode != 'zeros'
        or any(size % 2 == 0 for size in kernel_size)
        # Its first tap may be any pixel there, and the 1x1 branch on no tap.
        or any(s > 1 and d > 1 for s, d in zip(stride, dilation, strict=True))
    ):
        conv_type = None
    spans = [span(k, d) for k, d in zip(kernel_size, dilation, strict=True)]
    padding, size = padding_and_size(spans, choose.randint)
    options = dict(
        in_channels=ins,
        out_channels=outs,
        kernel_size=kernel_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=padding_mode,
        conv_cfg=None if conv_type is None else dict(type=conv_type),
        norm_cfg=choose.choice(NORMS),
        act_cfg=choose.choice(ACTS),
        **choose.choice(SE),
    )
    if kind is MobileOneBlock:
        options['num_convs'] = choose.randint(1, 4)
    if kind is DiverseBranchBlock:
        others = [name for name in ('1x1', '1x1_kxk', 'avg') if choose.random() < 0.8]
        options['branches'] = ('kxk', *others)
        options['internal_channels'] = choose.choice((None, groups, 3 * groups))
    return kind, options, size


@pytest.mark.parametrize(
    'seed', [*range(50), *(pytest.param(n, marks=pytest.mark.long) for n in range(50, 500))]
)
def test_one_conv_equals_the_branches(seed, tally, worst):
    kind, options, size = draw(seed)
    for dtype, precision in ((torch.float64, 'float64'), (torch.float32, 'float32')):
        block = kind(**options).to(dtype)
        x = image(2, options['in_channels'], *size, dtype=dtype)
        deployed = assert_deploy_equivalent(block, x)
        with torch.no_grad(), branch_by_branch(block):
            error = assert_same(block(x), deployed(x))
        worst(f'fold error in {precision}', error)
    tally('geometries')
