import pytest
import torch
from geometries import CHANNELS, conv_options
from hypothesis import given
from hypothesis import strategies as st
from laws import (
    assert_deploy_equivalent,
    assert_one_conv_exact,
    assert_same,
    assert_same_step,
    image,
    randomise,
    step,
)
from official_dbb import OfficialDBB
from torch import nn

from mmrep.models.blocks import DiverseBranchBlock

BRANCHES = ('kxk', '1x1', '1x1_kxk', 'avg')
subsets = st.sets(st.sampled_from(BRANCHES[1:])).map(lambda others: ('kxk', *others))
odd = st.sampled_from((1, 3, 5, 7))


@given(conv_options(), subsets, st.integers(0, 2))
def test_deploy_form(options, branches, factor):
    x = image(2, options['in_channels'], *options.pop('size'))
    internal = factor * options['groups'] or None
    block = DiverseBranchBlock(**options, branches=branches, internal_channels=internal)
    assert_deploy_equivalent(block.double(), x)


@given(conv_options(), subsets.filter(lambda branches: len(branches) > 1))
def test_one_conv_in_the_train_form(options, branches):
    x = image(2, options['in_channels'], *options.pop('size'))
    if options['groups'] == options['in_channels'] == options['out_channels']:
        branches = BRANCHES
    assert_one_conv_exact(DiverseBranchBlock(**options, branches=branches).double(), x)


@given(conv_options(kernels=st.tuples(odd, odd)))
def test_trains_as_the_official_block(options):
    """Outputs, gradients and running statistics, with the padding that keeps the size."""
    del options['padding'], options['padding_mode']
    size = [n + 10 for n in options.pop('size')]
    x = image(3, options['in_channels'], *size)
    official = randomise(OfficialDBB(**options).double())
    block = DiverseBranchBlock(**options).double()
    block.load_state_dict(official.state_dict())
    assert_same_step(step(official, x), step(block, x))
    # And once more, from the statistics that the first step left.
    assert_same_step(step(official, x), step(block, x))
    assert_same(official.eval()(x), block.eval()(x))


@pytest.mark.parametrize(('ins', 'outs', 'groups'), CHANNELS)
def test_branches_and_channels(ins, outs, groups):
    block = DiverseBranchBlock(ins, outs, groups=groups)
    depthwise = groups == ins == outs
    assert block.depthwise is depthwise
    assert block.internal_channels == (2 * ins if depthwise else ins)
    expected = {f'branch_{name}' for name in BRANCHES} - {'branch_1x1' if depthwise else ''}
    assert block.branches().keys() == expected
    first = block.branch_1x1_kxk.conv1
    assert isinstance(first, nn.Conv2d) is depthwise
    assert hasattr(block.branch_avg, 'conv1') is not depthwise


def test_starts_with_the_identity():
    """The first conv of 1x1-kxk is the identity, whatever ``init_cfg`` does to convs."""
    torch.manual_seed(0)
    cfg = dict(type='Constant', layer='Conv2d', val=3)
    block = DiverseBranchBlock(4, 4, groups=2, init_cfg=cfg)
    block.init_weights()
    assert (block.branch_kxk.conv.weight == 3).all()
    x = image(1, 4, 5, 5, dtype=torch.float32)
    assert torch.equal(block.branch_1x1_kxk.conv1(x), x)


@pytest.mark.parametrize('initialise', [False, True], ids=['built', 'init_weights'])
def test_single_init(initialise):
    """Starts as the kxk branch alone, and every branch can grow."""
    # Bodies have such an init_cfg.
    cfg = dict(type='Constant', layer='_BatchNorm', val=2)
    block = DiverseBranchBlock(4, 6, single_init=True, init_cfg=cfg)
    if initialise:
        block.init_weights()
    x = image(2, 4, 8, 8, dtype=torch.float32)
    assert torch.equal(block(x), block.branch_kxk(x))
    gradients = step(block, x)['gradients']
    assert gradients['branch_1x1.norm.weight'].norm() > 0
    assert gradients['branch_avg.norm2.weight'].norm() > 0
    assert gradients['branch_1x1_kxk.norm2.weight'].norm() > 0


def test_single_init_of_norms_without_scale():
    block = DiverseBranchBlock(
        4, 4, single_init=True, norm_cfg=dict(type='BN', affine=False)
    )
    block.init_weights()
    assert block.branch_kxk.norm.weight is None


def test_is_a_conv_and_a_norm_to_others():
    """No activation unless one is asked for."""
    assert DiverseBranchBlock(2, 2).act is None
    assert isinstance(DiverseBranchBlock(2, 2, act_cfg=dict(type='ReLU')).act, nn.ReLU)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(branches=('1x1',)), r"must include 'kxk' and may .*, not \('1x1',\)"),
        (dict(branches=('kxk', 'max')), r"branches must include .*not \('kxk', 'max'\)"),
        (dict(internal_channels=3, groups=2), 'internal_channels=3 must be a multiple of'),
        (dict(kernel_size=2), r'no padding keeps the size with kernel_size=\(2, 2\)'),
    ],
    ids=['no kxk', 'unknown', 'internal channels', 'even kernel'],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        DiverseBranchBlock(4, 4, **options)
