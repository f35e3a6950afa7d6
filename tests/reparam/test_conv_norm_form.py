"""switch_to_deploy(model, keep_norm=True): all blocks of a model or none."""

import pytest
import torch
from laws import assert_same, image, randomise
from torch import nn

from mmrep.models.backbones import RepVGG
from mmrep.models.blocks import ConvNormBlock, RepVGGBlock
from mmrep.models.heads import AuxiliaryClsHead
from mmrep.reparam import NotFoldableError, switch_to_deploy

SAME = dict(type='Conv2dAdaptivePadding')


def test_a_network(tmp_path):
    """All blocks, the tensors' type and what is frozen; as a config builds it."""
    arch = dict(
        num_blocks=[1, 1, 1, 1],
        width_factor=[0.125] * 4,
        group_layer_map=None,
        se_cfg=None,
    )
    model = randomise(RepVGG(arch, frozen_stages=1)).eval()
    x = image(2, 3, 32, 32, dtype=torch.float32)
    (expected,) = model(x)
    report = switch_to_deploy(model, keep_norm=True)
    assert len(report.switched) == 5 and report.deployed == []
    own = sum(p.numel() for p in model.parameters())
    assert report.params_after == own < report.params_before
    assert_same(expected, model(x)[0], 1e-5)
    frozen = [p.requires_grad for p in model.stem.parameters()]
    assert not any(frozen) and all(p.requires_grad for p in model.stage_4.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    built = RepVGG(arch, block_cfg=dict(type='mmrep.ConvNormBlock')).eval()
    built.load_state_dict(model.state_dict())
    assert_same(expected, built(x)[0], 1e-5)
    again = switch_to_deploy(model, keep_norm=True)
    assert again.switched == [] and len(again.deployed) == 5


@pytest.mark.parametrize(
    ('block', 'says'),
    [
        (RepVGGBlock(4, 4, norm_cfg=dict(type='BN', affine=False)), 'cannot be kept'),
        (ConvNormBlock(4, 4, 3, deploy=True, norm_cfg=dict(type='IN')), 'cannot be kept'),
        (RepVGGBlock(4, 4, norm_cfg=dict(type='IN')), 'branch_3x3'),
        (ConvNormBlock(4, 4, 3, 2, conv_cfg=SAME, deploy=True), "'SAME'"),
    ],
)
def test_what_cannot_be_is_refused(block, says):
    model = nn.Sequential(RepVGGBlock(4, 4), block)
    before = list(model)
    with pytest.raises(NotFoldableError, match=f'1: .*{says}'):
        switch_to_deploy(model, keep_norm=True)
    assert all(a is b for a, b in zip(model, before, strict=True))


def test_hooks_are_not_lost_without_a_word():
    model = nn.Sequential(RepVGGBlock(4, 4))
    handle = model[0].register_forward_hook(lambda *args: None)
    with pytest.raises(NotFoldableError, match='0: it has hooks: remove them first'):
        switch_to_deploy(model, keep_norm=True)
    handle.remove()
    switch_to_deploy(model, keep_norm=True)

    for register in ('register_full_backward_pre_hook', 'register_full_backward_hook'):
        model = nn.Sequential(RepVGGBlock(4, 4))
        getattr(model[0], register)(lambda *args: None)
        with pytest.raises(NotFoldableError, match='0: it has hooks'):
            switch_to_deploy(model, keep_norm=True)


def test_auxiliary_classifiers_stay():
    pytest.importorskip('mmpretrain')
    head = dict(type='mmpretrain.LinearClsHead', num_classes=2)
    own = [dict(head, in_channels=4)]
    head = AuxiliaryClsHead(dict(head, in_channels=4), own)
    model = nn.Sequential(RepVGGBlock(4, 4), head)
    report = switch_to_deploy(model, keep_norm=True)
    assert report.switched == ['0'] and model[1] is head and len(head.aux_heads) == 1


def test_a_block_by_itself_has_no_place():
    with pytest.raises(NotFoldableError, match='the model is a RepVGGBlock'):
        switch_to_deploy(RepVGGBlock(4, 4), keep_norm=True)


def test_blocks_of_others_are_refused():
    class Foreign(nn.Module):
        def switch_to_deploy(self):
            raise AssertionError('it must not be called')

    with pytest.raises(NotFoldableError, match='0 is a Foreign, which cannot keep a norm'):
        switch_to_deploy(nn.Sequential(Foreign()), keep_norm=True)


def test_a_block_of_two_names_stays_one():
    block = RepVGGBlock(4, 4)
    model = nn.ModuleDict(dict(a=block, b=block))
    switch_to_deploy(model, keep_norm=True)
    assert model['a'] is model['b'] and type(model['a']) is ConvNormBlock
