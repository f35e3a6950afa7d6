"""What a conv does besides multiplying."""

import pytest
import torch
from geometries import conv_options
from hypothesis import given
from hypothesis import strategies as st
from laws import Calls, assert_same, image
from mmcv.cnn.bricks import Conv2dAdaptivePadding
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations

from mmrep.reparam import (
    ConvGeometry,
    NotFoldableError,
    conv_geometry,
    is_watched,
    weight_in_eval_mode,
)


def same(kernel_size: int = 3, **options) -> ConvGeometry:
    """A geometry with 'SAME' padding."""
    return ConvGeometry(4, 4, (kernel_size,) * 2, padding_mode='same', **options)


@given(conv_options())
def test_convolves_as_the_conv_does(options):
    size = options.pop('size')
    layer = nn.Conv2d(**options, dtype=torch.float64)
    x = image(2, options['in_channels'], *size)
    y = conv_geometry(layer).convolve(x, layer.weight, layer.bias)
    assert_same(layer(x), y)


@given(conv_options(), st.integers(1, 9), st.integers(1, 9))
def test_same_is_mmcvs_adaptive_padding(options, height, width):
    for name in ('size', 'padding', 'padding_mode'):
        del options[name]
    layer = Conv2dAdaptivePadding(**options).double()
    geometry = conv_geometry(layer)
    assert geometry.padding_mode == 'same'
    x = image(2, options['in_channels'], height, width)
    y = geometry.convolve(x, layer.weight, layer.bias)
    strides = zip((height, width), options['stride'], strict=True)
    assert y.shape[2:] == tuple(-(-size // stride) for size, stride in strides)
    assert_same(layer(x), y)


@pytest.mark.parametrize(
    ('size', 'pad'), [((6, 6), ((0, 1), (0, 1))), ((5, 6), ((1, 1), (0, 1)))]
)
def test_same_pads_by_the_parity_of_the_input(size, pad):
    geometry = same(stride=(2, 2))
    assert geometry.moves_with_size
    assert geometry.pad(size) == pad
    assert geometry.start(size) == (-pad[0][0], -pad[1][0])


def test_same_with_a_stride_needs_the_size():
    with pytest.raises(NotFoldableError, match='run one forward pass first, or give'):
        same(stride=(2, 1)).pad()


def test_same_with_stride_1_does_not():
    geometry = same(5)
    assert not geometry.moves_with_size
    assert geometry.pad() == geometry.pad((9, 4)) == ((2, 2), (2, 2))


def test_padding_in_words():
    wide = conv_geometry(nn.Conv2d(4, 4, (5, 3), padding='same', dilation=(1, 3)))
    assert wide.padding == (2, 3)
    for size in (2, 3):
        valid = conv_geometry(nn.Conv2d(4, 4, size, padding='valid'))
        assert valid.padding == (0, 0)


@pytest.mark.parametrize('kernel_size', [(2, 3), (3, 2), (4, 2)], ids=str)
def test_same_in_words_of_an_even_kernel_is_uneven(kernel_size):
    with pytest.raises(NotFoldableError, match='even kernel pads unevenly'):
        conv_geometry(nn.Conv2d(4, 4, kernel_size, padding='same'))
    even = nn.Conv2d(4, 4, kernel_size, padding='same', dilation=2)
    assert conv_geometry(even).pad() == conv_geometry(even).pad((9, 9))


def test_the_defaults_are_those_of_a_conv():
    assert {ConvGeometry(4, 6, (3, 5))} == {conv_geometry(nn.Conv2d(4, 6, (3, 5)))}


def test_a_pad_is_around_rows_and_columns():
    geometry = conv_geometry(nn.Conv2d(4, 4, 7, padding=(1, 2)))
    assert geometry.pad() == ((1, 1), (2, 2))
    assert geometry.start() == (-1, -2)


@pytest.mark.parametrize(
    ('layer', 'pads'),
    [
        (nn.Conv2d(4, 4, 3, padding=1), 0),
        (nn.Conv2d(4, 4, 3, padding_mode='reflect'), 0),
        (nn.Conv2d(4, 4, 3, padding=(0, 1), padding_mode='reflect'), 1),
        (nn.Conv2d(4, 4, 3, padding=(1, 0), padding_mode='reflect'), 1),
        (Conv2dAdaptivePadding(4, 4, 1), 0),
        (Conv2dAdaptivePadding(4, 4, 3, stride=2), 1),
        (Conv2dAdaptivePadding(4, 4, (1, 2)), 1),
        (Conv2dAdaptivePadding(4, 4, (2, 1)), 1),
    ],
    ids=str,
)
def test_pads_by_a_copy_only_what_a_conv_cannot(layer, pads):
    x = image(1, 4, 8, 8, dtype=torch.float32)
    with Calls() as calls:
        y = conv_geometry(layer).convolve(x, layer.weight, layer.bias)
    assert calls['pad'] == pads
    assert_same(layer(x), y)


def nothing(*_) -> None:
    """A hook that does nothing."""


def patch(layer: nn.Module) -> None:
    layer.forward = layer.forward


#: Ways to do more than the forward of a layer's type; some return a handle.
WATCHED = {
    'patched': patch,
    'parametrized': parametrizations.weight_norm,
    'forward': lambda layer: layer.register_forward_hook(nothing),
    'before forward': lambda layer: layer.register_forward_pre_hook(nothing),
    'backward': lambda layer: layer.register_full_backward_hook(nothing),
    'before backward': lambda layer: layer.register_full_backward_pre_hook(nothing),
    'every forward': lambda layer: torch_module.register_module_forward_hook(nothing),
    'before every forward': lambda layer: torch_module.register_module_forward_pre_hook(
        nothing
    ),
    'every backward': lambda layer: torch_module.register_module_full_backward_hook(
        nothing
    ),
    'before every backward': (
        lambda layer: torch_module.register_module_full_backward_pre_hook(nothing)
    ),
}


@pytest.mark.parametrize('way', WATCHED)
def test_is_watched(way):
    layer = nn.Conv2d(2, 2, 1)
    assert is_watched(layer) is False
    handle = WATCHED[way](layer)
    assert is_watched(layer) is True
    if hasattr(handle, 'remove'):
        handle.remove()
        assert is_watched(layer) is False


def test_the_mode_of_a_layer_with_a_plain_weight_is_left():
    """Changing it and back would take longer than the rest of folding it."""

    class Modeless(nn.Conv2d):
        def train(self, mode=True):
            raise AssertionError

    layer = Modeless(2, 2, 1)
    assert weight_in_eval_mode(layer) is layer.weight


def test_hooks_that_set_no_weight_are_not_run():
    layer, calls = nn.Conv2d(2, 2, 1), []
    layer.register_forward_pre_hook(lambda *_: calls.append(0))
    assert weight_in_eval_mode(layer) is layer.weight
    assert calls == []
