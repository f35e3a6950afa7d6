"""A plain conv and its norm as one conv; for blocks, see test_contracts.py."""

import copy

import pytest
import torch
import torch.nn.functional as F
from laws import Calls, assert_differ, assert_same, count_convs, image, randomise, step
from mmcv.cnn.bricks import Conv2dAdaptivePadding
from mmcv.cnn.bricks.conv_ws import ConvWS2d
from mmengine.model.efficient_conv_bn_eval import (
    turn_on_efficient_conv_bn_eval_for_single_model,
)
from mmengine.utils import digit_version
from torch import Tensor, nn

from mmrep.models.backbones import RepVGG
from mmrep.models.blocks import RepVGGBlock
from mmrep.reparam import (
    apply_conv_norm,
    fold_norm,
    fuse_bn,
    one_conv_kernel,
    register_fold,
)


class Unit(nn.Module):
    def __init__(self, conv: nn.Module, norm: nn.Module, one_conv=True) -> None:
        super().__init__()
        self.conv, self.norm, self.one_conv = conv, norm, one_conv

    def forward(self, x: Tensor) -> Tensor:
        return apply_conv_norm(self.conv, self.norm, x, self.one_conv)


def norms_of(unit: Unit, x: Tensor) -> int:
    with Calls() as calls:
        unit(x)
    return calls['batch_norm']


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


@pytest.mark.parametrize(
    ('one_conv', 'size', 'norms'),
    [('auto', 20, 0), ('auto', 19, 1), (420, 21, 0), (420, 20, 1)],
)
def test_from_so_many_output_pixels_on(one_conv, size, norms):
    for x in (image(1, 4, 2 * size, 40), image(2, 4, 2 * size, 20)):
        for stride in (2, (4, 1), (1, 4)):
            assert norms_of(unit(one_conv, stride=stride), x) == norms
            assert count_convs(unit(one_conv, stride=stride), x) == 1


def test_always_is_for_an_output_of_less_than_a_pixel_too():
    assert norms_of(unit(True, stride=3), image(1, 4, 2, 2)) == 0


def test_the_default_is_by_the_number_of_pixels():
    module, big, small = unit(), X, image(1, 4, 3, 3)
    for x, norms in ((big, 0), (small, 1)):
        with Calls() as calls:
            apply_conv_norm(module.conv, module.norm, x)
        assert calls['batch_norm'] == norms
        kernel = one_conv_kernel(module.children(), lambda size: size, x, (1, 1))
        assert kernel == (None if norms else (20, 20))


@pytest.mark.parametrize(('one_conv', 'norms'), [('auto', 1), (400, 0), (True, 0)])
def test_by_itself_on_a_cpu_alone(one_conv, norms):
    assert norms_of(unit(one_conv).to('meta'), X.to('meta')) == norms


def test_a_norm_that_cannot_be_folded_computes():
    module = Unit(nn.Conv2d(4, 6, 3), nn.GroupNorm(2, 6)).double()
    assert_same(module.norm(module.conv(X)), module(X))


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


def test_a_norm_with_statistics_moves_them_in_training():
    """Though nobody said that its type is another function then."""

    class Own(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x)

    register_fold(Own)(fold_norm)
    module = randomise(Unit(nn.Conv2d(4, 6, 3), Own(6)).double()).train()
    before = module.norm.running_mean.clone()
    module(X)
    assert_differ(before, module.norm.running_mean)


class TestPrograms:
    """What asks for the code of a forward rather than for its outputs."""

    def block(self, **options) -> RepVGGBlock:
        return randomise(RepVGGBlock(4, 4, **options).double()).eval()

    @pytest.mark.parametrize('form', ['train', 'deploy'])
    def test_symbolic_trace(self, form):
        block = self.block()
        if form == 'deploy':
            block.switch_to_deploy()
        assert_same(block(X), torch.fx.symbolic_trace(block)(X))

    def test_efficient_evaluation_of_mmengine(self):
        model = RepVGG(dict(num_blocks=(1,), width_factor=(1,)), 3, 4, (0,))
        randomise(model.double()).train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        x = image(1, 3, 8, 8)
        expected = model(x)
        turn_on_efficient_conv_bn_eval_for_single_model(model)
        assert_same(expected, model(x))

    @pytest.mark.skipif(
        digit_version(torch.__version__) < digit_version('2.6'), reason='no Dim.AUTO'
    )
    def test_a_batch_of_any_size(self):
        """The rule by pixels holds for none of them."""
        block, batch = self.block(), torch.export.Dim('batch')
        x = image(2, 4, 10, 10)
        program = torch.export.export(block, (x,), dynamic_shapes=({0: batch},)).module()
        for size in (1, 2, 40):
            x = image(size, 4, 10, 10)
            assert_same(block(x), program(x))
