"""What other implementations of RepVGG and DBB get wrong, and this one does not.

One test for each row of a survey of mmpretrain 1.2, the official code, timm 1.0 and
tutorials. The numbers are largest absolute differences between their two forms.
"""

from collections.abc import Callable

import pytest
import torch
from laws import (
    assert_deploy_equivalent,
    assert_differ,
    assert_one_conv_exact,
    assert_same,
    image,
    randomise,
    step,
)
from torch import nn

from mmrep.models.backbones import RepVGG
from mmrep.models.blocks import DiverseBranchBlock, RepVGGBlock
from mmrep.reparam import compare_tensors, switch_to_deploy

FAULTS: dict[str, Callable[[], None]] = {}
TINY = dict(num_blocks=(1, 1), width_factor=(1, 1))


def fault(row: str) -> Callable:
    """Register the test of a row."""

    def register(test: Callable[[], None]) -> Callable[[], None]:
        FAULTS[row] = test
        return test

    return register


def assert_right(block: nn.Module, *size: int) -> nn.Module:
    """Both forms, and the train form by one conv, are one function."""
    x = image(2, block.in_channels, *size or (8, 9))
    assert_one_conv_exact(block.double(), x)
    return assert_deploy_equivalent(block, x)


def tiny(**options) -> RepVGG:
    """A RepVGG of three blocks."""
    return RepVGG(**dict(arch=TINY, base_channels=4, out_indices=(1,)) | options)


@fault('mmpretrain: SE block (D2se), 3.0, SE is dropped at deploy')
def _():
    deployed = assert_right(RepVGGBlock(8, 8, se_cfg=dict(ratio=4, divisor=1)))
    x = image(2, 8, 8, 9)
    without = deployed.branch_reparam(x).relu()
    assert_differ(without, deployed(x))


@fault('mmpretrain: Conv2dAdaptivePadding with stride 2, 2.8')
def _():
    for size in ((8, 8), (7, 7), (8, 7)):
        cfg = dict(type='Conv2dAdaptivePadding')
        assert_right(RepVGGBlock(4, 4, stride=2, conv_cfg=cfg), *size)


@fault("mmpretrain: padding_mode='reflect' is ignored in the branches")
def _():
    block = RepVGGBlock(4, 4, padding_mode='reflect')
    deployed = assert_right(block)
    assert deployed.branch_reparam.padding_mode == 'reflect'
    x = image(1, 4, 5, 5)
    zeros = RepVGGBlock(4, 4).double().eval()
    zeros.load_state_dict(block.state_dict())
    assert_differ(zeros(x), block(x))
    mirrored = nn.functional.pad(x, (1, 1, 1, 1), mode='reflect')
    assert_same(zeros(mirrored)[:, :, 1:-1, 1:-1], block(x))


@fault('mmpretrain: SyncBN and BN2d raise AssertionError')
def _():
    for kind in ('SyncBN', 'BN2d'):
        assert_right(RepVGGBlock(4, 4, norm_cfg=dict(type=kind, requires_grad=True)))


@fault('mmpretrain: padding != dilation is a shape error in forward')
def _():
    for padding, dilation in ((0, 1), (2, 1), (1, 2), (0, 2), (4, 3)):
        block = RepVGGBlock(4, 4, padding=padding, dilation=dilation)
        conv = nn.Conv2d(4, 4, 3, padding=padding, dilation=dilation)
        x = image(2, 4, 9, 9, dtype=torch.float32)
        assert block(x).shape == conv(x).shape
        assert_right(block, 9, 9)


@fault('mmpretrain: RepVGG(...).train() and .eval() return None')
def _():
    model = tiny()
    assert model.train() is model
    assert model.eval() is model


@fault('mmpretrain: frozen_stages takes effect only after the first .train()')
def _():
    model = tiny(frozen_stages=1)
    for module in (model.stem, model.stage_1):
        assert not any(m.training for m in module.modules())
        assert not any(p.requires_grad for p in module.parameters())
    assert all(p.requires_grad for p in model.stage_2.parameters())


@fault('mmpretrain: after deploy every parameter has requires_grad=False')
def _():
    model = tiny()
    switch_to_deploy(model)
    assert all(p.requires_grad for p in model.parameters())
    gradients = step(model, image(2, 3, 16, 16, dtype=torch.float32))['gradients']
    assert all(gradient.norm() > 0 for gradient in gradients.values())


@fault('official RepVGG: the training constructor ignores dilation')
def _():
    deployed = assert_right(RepVGGBlock(4, 4, padding=2, dilation=2), 9, 9)
    assert deployed.branch_reparam.dilation == (2, 2)
    block = RepVGGBlock(1, 1, padding=2, dilation=2, act_cfg=None)
    x = torch.zeros(1, 1, 9, 9)
    x[0, 0, 4, 4] = 1
    with torch.no_grad():
        reached = block.branch_3x3.conv(x)[0, 0].nonzero()
    assert reached.unique().tolist() == [2, 4, 6]
    assert len(reached) == 9


@fault('official DBB: dilation 2 is an assertion or a shape error')
def _():
    for kernel_size in (3, 5):
        for groups in (1, 4):
            block = DiverseBranchBlock(4, 4, kernel_size, dilation=2, groups=groups)
            assert_right(block, 11, 12)


@fault('official DBB: .half() crashes, the identity tensor is no buffer')
def _():
    block = randomise(DiverseBranchBlock(4, 4))
    x = image(2, 4, 16, 16)
    for mode in (True, False):
        expected = block.train(mode).double()(x)
        assert_same(expected, block.bfloat16()(x.bfloat16()))
    moved = block.to('meta')
    assert moved(x.to('meta').bfloat16()).is_meta


@fault('official DBB: groups == out_channels != in_channels crashes')
def _():
    for ins, outs in ((4, 2), (6, 3), (8, 2)):
        assert_right(DiverseBranchBlock(ins, outs, groups=outs))


@fault('official DBB: a non-square kernel swaps the padding of rows and columns')
def _():
    for kernel_size in ((1, 3), (5, 3), (3, 7)):
        assert_right(DiverseBranchBlock(4, 6, kernel_size), 9, 11)
        assert_right(DiverseBranchBlock(4, 4, kernel_size, groups=4), 9, 11)


@fault('official DBB: in float64 the average kernel is made in float32')
def _():
    block = randomise(DiverseBranchBlock(4, 4, branches=('kxk', 'avg')).double()).eval()
    block.one_conv = False
    x = image(2, 4, 8, 8)
    expected = block(x)
    block.switch_to_deploy()
    assert compare_tensors(expected, block(x)).rel_l2 < 1e-14


def folded_by_hand(branch: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """A conv and its own norm, mean and variance each in its place."""
    norm = branch.norm
    scale = norm.weight / (norm.running_var + norm.eps) ** 0.5
    weight = branch.conv.weight * scale[:, None, None, None]
    return weight, norm.bias - norm.running_mean * scale


@fault('seed 002: fuses the kxk conv with the norm of the 1x1 branch')
def _():
    block = randomise(DiverseBranchBlock(4, 4, branches=('kxk', '1x1')).double())
    weight, bias = folded_by_hand(block.branch_kxk)
    centre, more = folded_by_hand(block.branch_1x1)
    weight[:, :, 1:2, 1:2] += centre
    assert_same((weight, bias + more), block.equivalent_kernel_bias())


@fault('seed 002: folds the bias with running_var in the place of running_mean')
def _():
    block = randomise(DiverseBranchBlock(4, 4, branches=('kxk',)).double())
    _, bias = block.equivalent_kernel_bias()
    assert_same(folded_by_hand(block.branch_kxk)[1], bias)
    block.branch_kxk.norm.running_mean += 1
    assert_differ(bias, block.equivalent_kernel_bias()[1])


@fault("seed 001: stride 2 with 'SAME' padding, 4.0, the 1x1 kernel belongs at tap (0, 0)")
def _():
    cfg = dict(type='Conv2dAdaptivePadding')
    block = randomise(RepVGGBlock(4, 4, stride=2, conv_cfg=cfg).double())
    centre, _ = folded_by_hand(block.branch_1x1)
    for size, tap in (((8, 8), (0, 0)), ((7, 7), (1, 1)), ((7, 8), (1, 0))):
        expected, _ = folded_by_hand(block.branch_3x3)
        expected[:, :, tap[0], tap[1]] += centre[:, :, 0, 0]
        assert_same(expected, block.equivalent_kernel_bias(size)[0])


@fault('timm: RepVggBlock(inference_mode=True) is built with padding 0')
def _():
    x = image(1, 4, 8, 8, dtype=torch.float32)
    for block in (RepVGGBlock(4, 4, deploy=True), DiverseBranchBlock(4, 4, 3, deploy=True)):
        assert block(x).shape == x.shape
        assert block.branch_reparam.padding == (1, 1)


@fault('everyone: absolute tolerances mislead, outputs reach 4e3')
def _():
    """The error is relative, whatever the outputs' scale."""
    model = randomise(RepVGG('A0', base_channels=16)).eval()
    reference = model.double()(x := image(1, 3, 64, 64))[0]
    assert reference.abs().max() > 4e3
    switch_to_deploy(model.float())
    difference = compare_tensors(reference, model(x.float())[0])
    assert difference.rel_l2 < 1e-5
    assert compare_tensors(reference * 1e-3, reference * 1.1e-3).rel_l2 > 0.09


@fault('everyone: a missing .eval() is taken for a fault of fusing')
def _():
    """The mode is kept, and neither training nor fusing depends on it."""
    block = randomise(RepVGGBlock(4, 4).double()).train()
    x = image(2, 4, 8, 8)
    kernel, bias = block.equivalent_kernel_bias()
    assert_same((kernel, bias), block.eval().equivalent_kernel_bias())
    expected = block(x)
    block.train().switch_to_deploy()
    assert block.training
    assert_same(expected, block(x))


@pytest.mark.parametrize('row', FAULTS)
def test_is_right(row):
    FAULTS[row]()
