"""A block fused to one conv and one norm, for training that goes on."""

import copy

import pytest
import torch
from laws import assert_differ, assert_same, image, randomise
from test_contracts import BLOCKS, OPTIONS, SAME, SE, build, every_block
from torch import nn

from mmrep.models.backbones import RepVGG
from mmrep.models.blocks import ConvNormBlock, RepVGGBlock
from mmrep.models.heads import AuxiliaryClsHead
from mmrep.reparam import NotFoldableError, measure_norms, switch_to_deploy

#: What keeps no norm that could be trained.
WITHOUT = ['norm without scale']


def network(*blocks: nn.Module) -> nn.Sequential:
    return nn.Sequential(*blocks).double()


@every_block
@pytest.mark.parametrize('option', [name for name in OPTIONS if name not in WITHOUT])
def test_same_function(name, option):
    """In eval mode, before and after a later switch; in train mode with its statistics."""
    block = randomise(BLOCKS[name](**OPTIONS[option]).double()).eval()
    model, x = network(block), image(8, 4, 8, 9)
    expected = model(x)
    report = switch_to_deploy(model, keep_norm=True)
    (kept,) = model
    assert type(kept) is ConvNormBlock and not kept.deploy and not kept.training
    assert report.switched == ([] if name == 'conv and norm' else ['0'])
    assert report.params_after == sum(p.numel() for p in model.parameters())
    assert {key.partition('.')[0] for key in kept.state_dict()} <= {
        'branch_kxk',
        'se_layer',
        'act',
    }
    assert_same(expected, model(x), 1e-10)

    measure_norms(model, lambda: model(x))
    assert_same(expected, model(x), 1e-10)
    if kept._se is None and name != 'conv and norm':
        trained = copy.deepcopy(model).train()
        # Running statistics are unbiased, and a batch's are not.
        assert_same(expected, trained(x), 1e-2)
    # It is what a config of plain blocks builds.
    options = {k: v for k, v in OPTIONS[option].items() if k != 'with_cp'}
    built = type(kept)(4, 4, kept.kernel_size, groups=kept.groups, **options)
    if name == 'repvgg se':
        built = ConvNormBlock(4, 4, 3, **{'se_cfg': SE, **options})
    assert built.state_dict().keys() == kept.state_dict().keys()

    switch_to_deploy(model)
    assert_same(expected, model(x), 1e-10)
    assert [key for key in model.state_dict() if 'norm' in key] == []


@every_block
def test_it_can_be_trained(name):
    model = network(build(name)).train()
    switch_to_deploy(model, keep_norm=True)
    assert model[0].training
    model(image(4, 4, 8, 8)).square().sum().backward()
    for parameter in model[0].branch_kxk.parameters():
        assert parameter.grad is not None and parameter.grad.any()


@every_block
def test_a_deployed_block_gets_a_norm(name):
    block = build(name, 'deploy').eval()
    model, x = network(block), image(2, 4, 8, 8)
    expected = model(x)
    switch_to_deploy(model, keep_norm=True)
    assert type(model[0]) is ConvNormBlock and 'norm' in dict(model[0].branch_kxk._modules)
    assert_same(expected, model(x), 1e-10)


def test_the_norm_after_the_sum_stays():
    """With its statistics and what was learnt."""
    block = build('qarepvgg', 'eval')
    model = network(block)
    before = copy.deepcopy(block.post_norm)
    switch_to_deploy(model, keep_norm=True)
    norm = model[0].branch_kxk.norm
    for name in ('weight', 'bias', 'running_var'):
        assert_same(getattr(before, name), getattr(norm, name))


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
    assert report.params_after < report.params_before
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


@pytest.mark.parametrize('name', ['forward', 'linear'])
def test_a_way_of_its_own_is_not_lost(name):
    def twice(block, x):
        return 2 * getattr(RepVGGBlock, name)(block, x)

    kind = type('Twice', (RepVGGBlock,), {name: twice})
    with pytest.raises(NotFoldableError, match='0: its class computes in a way of its own'):
        switch_to_deploy(nn.Sequential(kind(4, 4)), keep_norm=True)


@pytest.mark.parametrize('name', ['repvgg', 'qarepvgg'])
def test_norms_that_use_their_statistics_still_do(name):
    model = network(build(name)).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    switch_to_deploy(model, keep_norm=True)
    assert model[0].training and not model[0].branch_kxk.norm.training


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


def test_measured_statistics():
    """Those of all that is read, over several batches; others keep theirs."""
    norm = randomise(nn.BatchNorm2d(5).double())
    unused = randomise(nn.BatchNorm2d(5).double())
    plain = nn.BatchNorm2d(5, affine=False).double()
    model = nn.ModuleList([norm, unused, plain]).train()
    unused.eval()
    batches = [3 + 2 * image(n, 5, 4, 3, seed=n) for n in (2, 3)]
    expected = [copy.deepcopy(norm).eval()(x) for x in batches]
    before = copy.deepcopy(unused.state_dict()), copy.deepcopy(plain.state_dict())
    count = measure_norms(model, lambda: [norm(x) for x in batches])
    assert count == 1
    values = torch.cat(batches).transpose(0, 1).flatten(1)
    assert_same(values.mean(1), norm.running_mean, 1e-12)
    assert_same(values.var(1), norm.running_var, 1e-12)
    assert norm.training and not unused.training and not norm._forward_pre_hooks
    norm.eval()
    for x, y in zip(batches, expected, strict=True):
        assert_same(y, norm(x), 1e-12)
    for old, now in zip(before, (unused, plain), strict=True):
        for key, value in now.state_dict().items():
            assert torch.equal(value, old[key])


def test_a_failed_run_changes_nothing():
    model = nn.Sequential(randomise(nn.BatchNorm2d(3)))
    before = copy.deepcopy(model.state_dict())

    def run():
        model(image(2, 3, 4, 4, dtype=torch.float32))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_norms(model, run)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.training and not model[0]._forward_pre_hooks
    assert_differ(model[0].running_var, torch.ones(3))
