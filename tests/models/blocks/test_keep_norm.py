"""A block fused to one conv and one norm, for training that goes on."""

import copy

import pytest
from laws import assert_same, image, randomise
from test_contracts import BLOCKS, OPTIONS, SE, build, every_block
from torch import nn

from mmrep.models.blocks import ConvNormBlock, RepVGGBlock
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


@pytest.mark.parametrize('name', ['forward', 'linear'])
def test_a_way_of_its_own_is_not_lost(name):
    def twice(block, x):
        return 2 * getattr(RepVGGBlock, name)(block, x)

    kind = type('Twice', (RepVGGBlock,), {name: twice})
    with pytest.raises(NotFoldableError, match='0: its class overrides forward or linear'):
        switch_to_deploy(nn.Sequential(kind(4, 4)), keep_norm=True)


@pytest.mark.parametrize('name', ['repvgg', 'qarepvgg'])
def test_norms_that_use_their_statistics_still_do(name):
    model = network(build(name)).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    switch_to_deploy(model, keep_norm=True)
    assert model[0].training and not model[0].branch_kxk.norm.training
