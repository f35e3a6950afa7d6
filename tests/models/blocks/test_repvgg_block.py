import pytest
import torch
from geometries import conv_options
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
from mmpretrain.models.backbones.repvgg import RepVGGBlock as MMPretrainBlock
from timm.models.byobnet import RepVggBlock as TimmBlock
from torch import nn

from mmrep.models.blocks import RepVGGBlock

threes = conv_options(kernels=st.just((3, 3)))


@given(threes)
def test_deploy_form(options):
    x = image(2, options['in_channels'], *options.pop('size'))
    assert_deploy_equivalent(RepVGGBlock(**options).double(), x)


@given(threes)
def test_one_conv_in_the_train_form(options):
    x = image(2, options['in_channels'], *options.pop('size'))
    assert_one_conv_exact(RepVGGBlock(**options).double(), x)


#: What mmpretrain's block computes right.
MMPRETRAIN = {
    'identity': dict(in_channels=4, out_channels=4),
    'channels': dict(in_channels=3, out_channels=4),
    'stride': dict(in_channels=4, out_channels=4, stride=2),
    'groups': dict(in_channels=4, out_channels=6, groups=2),
    'depthwise': dict(in_channels=4, out_channels=4, groups=4),
    'dilation': dict(in_channels=4, out_channels=4, padding=2, dilation=2),
    'se': dict(in_channels=16, out_channels=16, se_cfg=dict(ratio=4, divisor=1)),
}


@pytest.mark.parametrize('name', MMPRETRAIN)
def test_trains_as_mmpretrains_block(name):
    options = MMPRETRAIN[name]
    theirs = randomise(MMPretrainBlock(**options).double())
    ours = RepVGGBlock(**options).double()
    ours.load_state_dict(theirs.state_dict())
    x = image(3, options['in_channels'], 7, 8)
    for _ in range(2):
        assert_same_step(step(theirs, x), step(ours, x))
    assert_same(theirs.eval()(x), ours.eval()(x))


#: timm's names of a block's parts.
TIMM = {
    'branch_3x3.conv': 'conv_kxk.conv',
    'branch_3x3.norm': 'conv_kxk.bn',
    'branch_1x1.conv': 'conv_1x1.conv',
    'branch_1x1.norm': 'conv_1x1.bn',
    'branch_norm': 'identity',
}


@pytest.mark.parametrize('stride', [1, 2])
def test_equals_timms_block(stride):
    ours = randomise(RepVGGBlock(4, 4, stride=stride).double()).eval()
    theirs = TimmBlock(4, 4, stride=stride).double().eval()
    state = {}
    for key, tensor in ours.state_dict().items():
        part, name = key.rsplit('.', 1)
        state[f'{TIMM[part]}.{name}'] = tensor
    theirs.load_state_dict(state)
    x = image(2, 4, 7, 8)
    assert_same(theirs(x), ours(x))


@pytest.mark.parametrize(
    ('options', 'has_identity'),
    [
        (dict(), True),
        (dict(out_channels=6), False),
        (dict(stride=2), False),
        (dict(stride=(1, 2)), False),
        (dict(padding=2), False),
        (dict(padding=2, dilation=2), True),
        (dict(padding=(1, 2), dilation=(1, 2)), True),
        (dict(groups=4), True),
    ],
    ids=str,
)
def test_identity_where_the_shape_stays(options, has_identity):
    options = {'in_channels': 4, 'out_channels': 4, 'padding': 1, **options}
    block, conv = RepVGGBlock(**options), nn.Conv2d(kernel_size=3, **options)
    assert ('branch_norm' in block.branches()) is has_identity
    x = image(1, 4, 6, 6, dtype=torch.float32)
    assert block(x).shape == conv(x).shape


@pytest.mark.parametrize('kernel_size', [1, 5, (3, 5)])
def test_is_3x3(kernel_size):
    with pytest.raises(ValueError, match='RepVGGBlock takes only kernel_size=3, not'):
        RepVGGBlock(4, 4, kernel_size=kernel_size)
