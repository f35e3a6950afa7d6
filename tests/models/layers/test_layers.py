"""The layers that blocks are made of."""

import pytest
import torch
import torch.nn.functional as F
from geometries import conv_options
from hypothesis import given
from hypothesis import strategies as st
from laws import assert_same, image, randomise
from mmpretrain.models.backbones.repvgg import MTSPPF as MMPretrainMTSPPF
from mmpretrain.models.utils import GRN as MMPretrainGRN
from mmpretrain.models.utils import LayerNorm2d as MMPretrainLayerNorm2d
from mmpretrain.models.utils import SELayer as MMPretrainSELayer
from torch import nn

from mmrep.models.layers import (
    GRN,
    MTSPPF,
    ChannelBias,
    DilatedAvgPool2d,
    IdentityConv1x1,
    LayerNorm2d,
    PadOrCrop,
    SELayer,
    build_activation,
)
from mmrep.reparam import ConvGeometry, LinearConv, NotFoldableError, fold_layer

sides = st.tuples(st.integers(-2, 3), st.integers(-2, 3))
MODES = {'zeros': 'constant', 'reflect': 'reflect', 'replicate': 'replicate'}


@given(sides, sides, st.sampled_from(list(MODES)))
def test_pad_or_crop(rows, columns, mode):
    """Cut from a map that is padded all around."""
    x = image(2, 3, 7, 8)
    around = F.pad(x, (3, 3, 3, 3), mode=MODES[mode])
    (top, bottom), (left, right) = rows, columns
    expected = around[:, :, 3 - top : 10 + bottom, 3 - left : 11 + right]
    assert torch.equal(PadOrCrop(rows, columns, mode)(x), expected)


@given(conv_options())
def test_dilated_average(options):
    """The mean of the pixels that unfold lists under the taps."""
    x = image(2, options['in_channels'], *options.pop('size'))
    geometry = ConvGeometry(**options)
    rows, columns = geometry.padding
    mode = 'constant' if geometry.padding_mode == 'zeros' else geometry.padding_mode
    padded = F.pad(x, (columns, columns, rows, rows), mode=mode)
    taps = F.unfold(padded, geometry.kernel_size, geometry.dilation, 0, geometry.stride)
    y = DilatedAvgPool2d(geometry)(x)
    assert_same(taps.unflatten(1, (x.shape[1], -1)).mean(2), y.flatten(2))


def test_average_is_exact_in_float64():
    """Not a float32 kernel that was cast."""
    geometry = ConvGeometry(1, 1, (3, 7), dilation=(2, 1))
    y = DilatedAvgPool2d(geometry)(torch.ones(1, 1, 5, 7, dtype=torch.float64))
    assert abs(y.item() - 1) < 1e-15


@pytest.mark.parametrize('groups', [1, 2, 4])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64], ids=str)
def test_identity_conv(groups, dtype):
    layer = IdentityConv1x1(4, groups).to(dtype)
    x = image(2, 4, 3, 3, dtype=dtype)
    assert torch.equal(layer(x), x)
    randomise(layer)
    assert_same(x + F.conv2d(x, layer.weight, groups=groups), layer(x))
    assert list(layer.state_dict()) == ['weight']


SE_CONFIGS = {
    'default': {},
    'D2se': dict(ratio=16, divisor=1),
    'rounding': dict(ratio=3),
    'squeeze_channels': dict(squeeze_channels=5),
    'activations': dict(act_cfg=(dict(type='ReLU'), dict(type='HSigmoid'))),
    'one activation': dict(act_cfg=dict(type='ReLU')),
    'no bias': dict(bias=False),
}


@pytest.mark.parametrize('name', SE_CONFIGS)
@pytest.mark.parametrize('channels', [16, 90])
def test_se_layer_is_mmpretrains(name, channels):
    theirs = randomise(MMPretrainSELayer(channels, **SE_CONFIGS[name]).double())
    ours = SELayer(channels, **SE_CONFIGS[name]).double()
    ours.load_state_dict(theirs.state_dict())
    x = image(2, channels, 3, 4)
    assert_same(theirs(x), ours(x))


def test_mtsppf_is_mmpretrains():
    theirs = randomise(MMPretrainMTSPPF(6, 8).double())
    ours = MTSPPF(6, 8).double()
    ours.load_state_dict(theirs.state_dict())
    x = image(2, 6, 9, 9)
    assert_same(theirs(x), ours(x))


@pytest.mark.parametrize(
    ('cfg', 'in_place'),
    [
        (dict(type='ReLU'), True),
        (dict(type='ReLU', inplace=False), False),
        (dict(type='HSwish'), True),
        (dict(type='GELU'), None),
        (dict(type='Sigmoid'), None),
        (dict(type=nn.LeakyReLU), True),
    ],
    ids=str,
)
def test_activation_is_in_place_where_it_can_be(cfg, in_place):
    before = dict(cfg)
    assert getattr(build_activation(cfg), 'inplace', None) is in_place
    assert cfg == before


def test_grn_and_a_bias_are_mmpretrains():
    theirs = randomise(MMPretrainGRN(6).double())
    own = nn.Sequential(GRN(6), ChannelBias(6)).double()
    own[0].gamma, own[1].bias = theirs.gamma, theirs.beta
    x = image(2, 6, 5, 7)
    assert_same(theirs(x), own(x))


def test_layer_norm_is_mmpretrains():
    theirs = randomise(MMPretrainLayerNorm2d(6, eps=1e-3).double())
    own = LayerNorm2d(6, eps=1e-3).double()
    own.load_state_dict(theirs.state_dict())
    x = image(2, 6, 5, 7)
    assert_same(theirs(x), own(x))


def start(channels: int) -> LinearConv:
    return LinearConv(channels, channels, torch.float64, torch.device('cpu'))


def test_bias_folds_before_and_after_a_conv():
    layers = nn.Sequential(
        ChannelBias(4), nn.Conv2d(4, 6, 1, bias=False), ChannelBias(6)
    ).double()
    randomise(layers)
    folded = fold_layer(layers, start(4))
    x = image(2, 4, 5, 7)
    assert_same(layers(x), F.conv2d(x, folded.weight, folded.bias))


def test_bias_before_a_conv_that_pads_zeros_is_no_conv():
    layers = nn.Sequential(ChannelBias(4), nn.Conv2d(4, 4, 3, padding=1)).double()
    with pytest.raises(NotFoldableError):
        fold_layer(randomise(layers), start(4))
