"""A plain conv and its norm as one conv; for blocks, see test_contracts.py."""

import copy

import pytest
import torch
import torch.nn.functional as F
from laws import assert_same, count_convs, image, randomise, step
from mmcv.cnn.bricks import Conv2dAdaptivePadding
from mmcv.cnn.bricks.conv_ws import ConvWS2d
from torch import Tensor, nn

from mmrep.reparam import conv_norm, fuse_bn


class Unit(nn.Module):
    def __init__(self, conv: nn.Module, norm: nn.Module, one_conv=True) -> None:
        super().__init__()
        self.conv, self.norm, self.one_conv = conv, norm, one_conv

    def forward(self, x: Tensor) -> Tensor:
        return conv_norm(self.conv, self.norm, x, self.one_conv)


class NormCounter(torch.overrides.TorchFunctionMode):
    """Counts the batch norms that are computed."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += getattr(func, '__name__', '') == 'batch_norm'
        return func(*args, **(kwargs or {}))


def norms_of(unit: Unit, x: Tensor) -> int:
    with NormCounter() as counter:
        unit(x)
    return counter.count


def unit(one_conv=True, **options) -> Unit:
    conv = nn.Conv2d(4, 6, 3, **{'padding': 1, 'bias': False, **options})
    return randomise(Unit(conv, nn.BatchNorm2d(6), one_conv).double()).eval()


X = image(2, 4, 20, 20)


@pytest.mark.parametrize(
    'options',
    [
        {},
        dict(stride=2, bias=True),
        dict(padding_mode='reflect'),
        dict(groups=2, dilation=(1, 2)),
    ],
    ids=str,
)
def test_the_same_with_gradients(options):
    plain, one = unit(False, **options), unit(True, **options)
    assert_same(step(plain, X), step(one, X))
    assert (norms_of(plain, X), norms_of(one, X)) == (1, 0)


@pytest.mark.parametrize(('one_conv', 'size', 'norms'), [('auto', 20, 0), ('auto', 19, 1)])
def test_from_so_many_output_pixels_on(one_conv, size, norms):
    for x in (image(1, 4, 2 * size, 40), image(2, 4, 2 * size, 20)):
        assert norms_of(unit(one_conv, stride=2), x) == norms
        assert count_convs(unit(one_conv, stride=2), x) == 1


@pytest.mark.parametrize(
    'change',
    [
        lambda unit: unit.norm.train(),
        lambda unit: unit.norm.register_forward_hook(lambda *_: None),
        lambda unit: unit.conv.register_full_backward_hook(lambda *_: None),
        lambda unit: nn.utils.parametrizations.weight_norm(unit.conv),
        lambda unit: setattr(unit, 'conv', ConvWS2d(4, 6, 3, padding=1).double()),
        lambda unit: setattr(unit, 'conv', nn.Sequential(unit.conv)),
    ],
    ids=[
        'batch statistics',
        'hook',
        'backward hook',
        'parametrization',
        'another conv',
        'a module without a geometry',
    ],
)
def test_not_where_it_would_be_another_function(change):
    plain, one = unit(False), unit(True)
    for each in (plain, one):
        torch.manual_seed(0)
        change(each)
    assert norms_of(one, X) == 1
    assert_same(plain(X), one(X))


def test_half_precision_is_folded_in_float32():
    half = unit().bfloat16()
    output = half(X.bfloat16())
    assert output.dtype == torch.bfloat16
    assert_same(unit()(X), output)
    conv, norm = unit().bfloat16().children()
    weight, bias = copy.deepcopy(conv).float().weight, None
    exact = fuse_bn(
        weight,
        bias,
        *(tensor.float() for tensor in (norm.running_mean, norm.running_var)),
        norm.eps,
        *(tensor.float() for tensor in norm.parameters()),
    )
    kernel, bias = (tensor.bfloat16() for tensor in exact)
    assert torch.equal(output, F.conv2d(X.bfloat16(), kernel, bias, padding=1))


@pytest.mark.parametrize('size', [(8, 8), (7, 8)], ids=str)
def test_same_padding_with_a_stride(size):
    conv = Conv2dAdaptivePadding(4, 6, 3, stride=2)
    one = randomise(Unit(conv, nn.BatchNorm2d(6)).double()).eval()
    x = image(2, 4, *size)
    assert norms_of(one, x) == 0
    assert_same(one.norm(one.conv(x)), one(x))
