import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from geometries import conv_options
from hypothesis import given
from hypothesis import strategies as st
from laws import Calls, assert_differ, assert_same, image, randomise
from mmcv.cnn import ConvModule
from mmcv.cnn.bricks import Conv2d as MMCVConv2d
from mmcv.cnn.bricks import Conv2dAdaptivePadding
from mmcv.cnn.bricks.conv_ws import ConvWS2d
from mmcv.cnn.bricks.drop import DropPath
from mmcv.cnn.bricks.scale import LayerScale, Scale
from mmcv.ops import SyncBatchNorm
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torchvision.ops import FrozenBatchNorm2d

import mmrep.models  # noqa: F401, for how mmcv's layers are folded
from mmrep.reparam import (
    ConvGeometry,
    LinearConv,
    NotFoldableError,
    computes_as_folded,
    conv_geometry,
    fold,
    fold_branches,
    fold_layer,
    fold_norm,
    has_running_statistics,
    identity_kernel,
    norm_tensors,
    register_fold,
    register_linear_conv,
)


def target(channels: int = 4, kernel_size: int = 3, **options) -> ConvGeometry:
    """The geometry of a conv that keeps the size."""
    pad = kernel_size // 2
    options = {'padding': (pad, pad), **options}
    return ConvGeometry(channels, channels, (kernel_size, kernel_size), **options)


def conv(kernel_size: int | tuple = 3, **options) -> nn.Conv2d:
    """A conv that keeps the size, without a bias unless one is asked for."""
    if 'padding' not in options:
        options['padding'] = kernel_size // 2
    return nn.Conv2d(4, 4, kernel_size, **{'bias': False, **options})


def assert_folds(branches: dict[str, nn.Module], geometry: ConvGeometry, x=None) -> None:
    """One conv of that geometry equals the sum of the branches, in eval mode."""
    if x is None:
        x = image(2, geometry.in_channels, 7, 8)
    for seed, branch in enumerate(branches.values()):
        randomise(branch.double(), seed).eval()
    folded = fold_branches(branches, geometry, tuple(x.shape[2:]), x.dtype)
    expected = sum(branch(x) for branch in branches.values())
    assert_same(expected, geometry.convolve(x, folded.weight, folded.bias))
    # What it says of itself is that geometry.
    assert folded.place_in(geometry) == ((0, 0), (1, 1))
    assert (folded.in_channels, folded.fill) == (geometry.in_channels, geometry.fill)


@given(conv_options(), st.booleans())
def test_conv_norm(options, bias):
    size = options.pop('size')
    layer = nn.Conv2d(**options, bias=bias)
    unit = nn.Sequential(layer, nn.BatchNorm2d(options['out_channels'], eps=0.01))
    x = image(2, options['in_channels'], *size)
    assert_folds({'unit': unit}, conv_geometry(layer), x)


#: Branches between 4 and 4 channels, each a part of a 3x3 conv.
BRANCHES = {
    'conv3x3': lambda groups: nn.Sequential(conv(3, groups=groups), nn.BatchNorm2d(4)),
    'conv1x1': lambda groups: nn.Sequential(conv(1, groups=groups), nn.BatchNorm2d(4)),
    'norm': lambda groups: nn.BatchNorm2d(4),
    'two norms': lambda groups: nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4)),
    'two 1x1': lambda groups: nn.Sequential(
        conv(1, groups=groups, bias=True), nn.BatchNorm2d(4), conv(1, groups=groups)
    ),
    '1x1, 3x3': lambda groups: nn.Sequential(
        conv(1, groups=groups), conv(3, groups=groups, bias=True)
    ),
    'conv3x1': lambda groups: conv((3, 1), padding=(1, 0), groups=groups),
    'synchronised norm': lambda groups: nn.SyncBatchNorm(4),
    'tracking instance norm': lambda groups: nn.InstanceNorm2d(
        4, affine=True, track_running_stats=True
    ),
    'norm without scale': lambda groups: nn.BatchNorm2d(4, affine=False),
    'identity and norm': lambda groups: nn.Sequential(nn.Identity(), nn.BatchNorm2d(4)),
    "padding='same'": lambda groups: conv(3, padding='same', groups=groups),
    "padding='valid'": lambda groups: conv(1, padding='valid', groups=groups),
    'weight norm': lambda groups: nn.utils.parametrizations.weight_norm(
        conv(3, groups=groups)
    ),
    '3x3, 1x1': lambda groups: nn.Sequential(
        conv(3, groups=groups, bias=True), conv(1, bias=True, groups=groups)
    ),
    'norm, 1x1': lambda groups: nn.Sequential(
        nn.BatchNorm2d(4), conv(1, groups=groups, bias=True)
    ),
    'depthwise, pointwise': lambda groups: nn.Sequential(
        conv(3, groups=4), nn.BatchNorm2d(4), conv(1, groups=groups)
    ),
    'pointwise, depthwise': lambda groups: nn.Sequential(
        conv(1, groups=groups), conv(3, groups=4, bias=True)
    ),
    'in 2 and 1 groups': lambda groups: nn.Sequential(
        conv(3, groups=2 * groups if groups < 4 else 4), conv(1, groups=groups)
    ),
    'average, 1x1': lambda groups: nn.Sequential(
        nn.AvgPool2d(3, 1, 1), conv(1, groups=groups, bias=True), nn.BatchNorm2d(4)
    ),
    'average, other divisor': lambda groups: nn.Sequential(
        nn.AvgPool2d((3, 1), 1, (1, 0), divisor_override=5), nn.BatchNorm2d(4)
    ),
    'padding layer': lambda groups: nn.Sequential(
        nn.ZeroPad2d((0, 1, 1, 0)), conv(2, padding=0, groups=groups)
    ),
    'dropout': lambda groups: nn.Sequential(conv(1, groups=groups), nn.Dropout2d(0.5)),
    'drop path': lambda groups: nn.Sequential(DropPath(0.5), conv(1, groups=groups)),
    'one scale': lambda groups: nn.Sequential(
        conv(3, groups=groups, bias=True), Scale(2.0)
    ),
    'scales': lambda groups: nn.Sequential(
        LayerScale(4, data_format='channels_first'), nn.BatchNorm2d(4)
    ),
    'ConvModule': lambda groups: ConvModule(
        4, 4, 3, padding=1, groups=groups, norm_cfg=dict(type='BN'), act_cfg=None
    ),
    'ConvModule, norm first': lambda groups: ConvModule(
        4,
        4,
        1,
        groups=groups,
        norm_cfg=dict(type='BN'),
        act_cfg=None,
        order=('norm', 'conv', 'act'),
    ),
    'strip of a wider kernel': lambda groups: conv((1, 3), padding=(0, 1), groups=groups),
}


@pytest.mark.parametrize('groups', [1, 2, 4])
@pytest.mark.parametrize('name', BRANCHES)
def test_branch_in_a_3x3_kernel(name, groups):
    assert_folds({name: BRANCHES[name](groups)}, target(groups=groups))


@pytest.mark.parametrize('groups', [1, 2, 4])
def test_sum_of_branches(groups):
    branches = {name: make(groups) for name, make in BRANCHES.items()}
    assert_folds(branches, target(groups=groups))
    assert_folds(branches, target(kernel_size=5, groups=groups))


@pytest.mark.parametrize('groups', [1, 2, 4])
def test_branch_without_tensors(groups):
    """A plain shortcut beside a conv."""
    branches = {'shortcut': nn.Identity(), 'conv': conv(3, groups=groups)}
    assert_folds(branches, target(groups=groups))


@pytest.mark.parametrize('groups', [1, 2])
def test_branches_with_more_outputs(groups):
    def wide(size, **options):
        return nn.Conv2d(4, 6, size, padding=size // 2, groups=groups, **options)

    branches = {
        'no bias': wide(3, bias=False),
        'norm first': nn.Sequential(nn.BatchNorm2d(4), wide(1)),
        'average first': nn.Sequential(nn.AvgPool2d(3, 1, 1), wide(1)),
        'norm last': nn.Sequential(wide(1), nn.BatchNorm2d(6)),
    }
    geometry = conv_geometry(branches['no bias'])
    for name, branch in branches.items():
        assert_folds({name: branch}, geometry)
    assert_folds(branches, geometry)
    with pytest.raises(NotFoldableError, match=r'^shortcut: .* 4 outputs'):
        fold_branches({'shortcut': nn.Identity(), **branches}, geometry)


@pytest.mark.parametrize('name', ['3x3, 1x1', 'average, 1x1', 'depthwise, pointwise'])
def test_strides_multiply(name):
    """That of the conv before a 1x1 and its own."""
    first, *rest = BRANCHES[name](1)
    first.stride, rest[-1].stride = (2, 3), (3, 2)
    if name == 'average, 1x1':
        rest = rest[:1]
        rest[0].stride = (3, 2)
    assert_folds(
        {name: nn.Sequential(first, *rest)}, target(stride=(6, 6)), image(2, 4, 19, 13)
    )


@pytest.mark.parametrize(
    'layers',
    [
        [conv(1), conv(1), conv(3)],
        [conv(3, bias=True), conv(1)],
        [conv(3), conv(1, bias=True)],
        [nn.AvgPool2d((1, 3), 1, (0, 1), ceil_mode=True)],
    ],
    ids=['no bias', 'first bias', 'last bias', 'ceil_mode without a stride'],
)
def test_layers_in_a_row(layers):
    assert_folds({'branch': nn.Sequential(*layers)}, target())


@pytest.mark.parametrize('taps', [None, 5])
def test_a_mean_of_all_its_pixels(taps):
    """Which no padding is among: whether it counted does not matter."""
    pool = nn.AvgPool2d((2, 3), (2, 1), count_include_pad=False, divisor_override=taps)
    geometry = ConvGeometry(4, 4, (2, 3), (2, 1))
    assert_folds({'pool': pool}, geometry)
    wide = nn.Sequential(nn.Conv2d(4, 6, 1), pool)
    assert_folds({'wide': wide}, replace(geometry, out_channels=6))


def test_the_channels_of_an_average_are_those_before_it():
    """Whatever its geometry says; and it is made where it is needed."""
    channels = 1 << 40
    start = LinearConv(channels, channels, torch.float32, torch.device('meta'))
    partial = start.then_average(ConvGeometry(1, 1, (2, 3)))
    assert (partial.in_channels, partial.out_channels, partial.groups) == (channels,) * 3
    assert partial.weight.is_meta and partial.weight.shape == (channels, 1, 2, 3)


@pytest.mark.parametrize('shift', [True, False])
@pytest.mark.parametrize('layer', [conv(3), conv(3, bias=True), nn.Identity()], ids=str)
def test_a_scale_and_a_shift(layer, shift):
    layer = randomise(copy.deepcopy(layer).double())
    scale, x = image(4, seed=5), image(2, 4, 7, 8)
    shift = image(4, seed=6) if shift else None
    partial = LinearConv(4, 4, torch.float64, torch.device('cpu'))
    partial = fold_layer(layer, partial).then_scale(scale, shift)
    expected = layer(x) * scale.reshape(-1, 1, 1)
    if shift is not None:
        expected = expected + shift.reshape(-1, 1, 1)
    assert (partial.bias is None) == (
        shift is None and getattr(layer, 'bias', None) is None
    )
    pad = partial.kernel_size[0] // 2
    y = F.conv2d(
        x, partial.kernel(partial.groups), partial.bias, padding=pad, groups=partial.groups
    )
    assert_same(expected, y)


@pytest.mark.parametrize(('kernel_size', 'dilation'), [(5, 1), (3, 2), (2, 4), (3, (1, 2))])
def test_dilated_kernel_in_a_kernel_of_smaller_dilation(kernel_size, dilation):
    """UniRepLKNet's: the taps lie apart."""
    rows, columns = (dilation,) * 2 if isinstance(dilation, int) else dilation
    spans = [d * (kernel_size - 1) for d in (rows, columns)]
    layer = conv(kernel_size, dilation=dilation, padding=tuple(s // 2 for s in spans))
    branches = {'dilated': nn.Sequential(layer, nn.BatchNorm2d(4)), 'whole': conv(5)}
    assert_folds(branches, target(kernel_size=5))


@pytest.mark.parametrize('pointwise_first', [True, False])
@pytest.mark.parametrize(
    'geometry', [target(dilation=(2, 2), padding=(2, 2)), target(kernel_size=5)], ids=str
)
def test_a_dilated_kernel_and_a_1x1(geometry, pointwise_first):
    layers = [conv(1), conv(3, dilation=2, padding=2)]
    if not pointwise_first:
        layers.reverse()
    assert_folds({'branch': nn.Sequential(*layers)}, geometry)


def test_nothing_folded_is_the_identity():
    """A 1x1 conv of stride 1, for layers of a user's to follow."""
    start = LinearConv(4, 4, torch.float64, torch.device('cpu'))
    assert (start.kernel_size, start.groups, start.start) == ((1, 1), 1, (0, 0))
    assert start.stride == start.dilation == (1, 1)
    assert start.is_pointwise
    assert start.place_in(target()) == ((1, 1), (1, 1))
    assert torch.equal(start.kernel(2), identity_kernel(4, 2, torch.float64))
    assert start._replace(device=torch.device('meta')).kernel(2).is_meta


@pytest.mark.parametrize(('first', 'second'), [(2, 3), (3, 2), (6, 3), (2, 6)])
def test_groups_in_a_row(first, second):
    """The common divisor of both is left."""
    layers = nn.Conv2d(6, 6, 1, groups=first), nn.Conv2d(6, 6, 3, groups=second)
    groups = math.gcd(first, second)
    branch = nn.Sequential(*layers)
    assert_folds({'branch': branch}, target(6, padding=(0, 0), groups=groups))


#: Paddings in a row, left, right, top and bottom, and what they come to around a 3x3 conv.
PADDINGS = {
    'around': ([(1, 1, 1, 1), (1, 1, 1, 1)], (2, 2)),
    'rows, then all': ([(0, 0, 1, 1), (2, 2, 1, 1)], (2, 2)),
    'columns, then all': ([(1, 1, 0, 0), (0, 0, 1, 1)], (1, 1)),
    'above, then the rest': ([(0, 0, 1, 0), (1, 1, 0, 1)], (1, 1)),
    'left, then the rest': ([(1, 0, 0, 0), (0, 1, 1, 1)], (1, 1)),
}


@pytest.mark.parametrize('name', PADDINGS)
def test_paddings_in_a_row(name):
    paddings, total = PADDINGS[name]
    branch = nn.Sequential(*map(nn.ZeroPad2d, paddings), conv(3, padding=0))
    assert_folds({'branch': branch}, target(padding=total))


@pytest.mark.parametrize('mode', ['zeros', 'reflect'])
@pytest.mark.parametrize(
    'crop', [(-1, -1, -1, -1), (0, 0, -1, -1), (-1, -1, 0, 0), (-1, 0, 0, 0)], ids=str
)
def test_a_crop_pads_nothing(crop, mode):
    """It may follow a bias, and stand in a target of any padding mode."""
    branch = nn.Sequential(conv(1, bias=True), nn.ZeroPad2d(crop), conv(3, padding=0))
    left, right, top, bottom = crop
    geometry = ConvGeometry(4, 4, (3 - top - bottom, 3 - left - right), padding_mode=mode)
    assert_folds({'branch': branch}, geometry)


@pytest.mark.parametrize('groups', [1, 2])
def test_a_norm_after_the_sum(groups):
    """What is folded can be followed, as in QARepVGG."""
    branches = {name: BRANCHES[name](groups) for name in ('conv3x3', 'norm', 'conv1x1')}
    module = randomise(nn.ModuleDict(branches).double()).eval()
    norm = randomise(nn.BatchNorm2d(4).double(), seed=9).eval()
    x = image(2, 4, 7, 8)
    folded = fold_layer(norm, fold_branches(branches, target(groups=groups)))
    expected = norm(sum(branch(x) for branch in module.values()))
    assert_same(expected, target(groups=groups).convolve(x, folded.weight, folded.bias))
    widened = fold_layer(conv(1).double(), folded)
    assert widened.groups == 1


class Swapped(nn.Conv2d):
    """A conv that convolves with another kernel than its weight."""

    def forward(self, x):
        return F.conv2d(x, self.weight.flip(2), None, padding=self.padding)


class SwappedInside(nn.Conv2d):
    """The same, one level down."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight.flip(2), bias)


class SwappedWrapper(MMCVConv2d):
    """The same, of a type that is registered."""

    def forward(self, x):
        return super().forward(x.flip(2))


class Doubled(nn.BatchNorm2d):
    """A norm with another function."""

    def forward(self, x):
        return 2 * super().forward(x)


class Skipping(nn.Sequential):
    """Layers of which the last is left out."""

    def forward(self, x):
        return self[0](x)


class Negative(nn.Identity):
    def forward(self, x):
        return -x


def own_forward() -> nn.Module:
    """A layer that somebody patched."""
    layer = conv(3)
    layer.forward = lambda x: 2 * F.conv2d(x, layer.weight, padding=1)
    return layer


def own_conv_forward() -> nn.Module:
    layer = conv(3)
    layer._conv_forward = lambda x, weight, bias: F.conv2d(x, 2 * weight, padding=1)
    return layer


def pruned_and_hooked() -> nn.Module:
    """A hook that sets the weight, and one that does anything."""
    layer = hooked()
    prune.identity(layer, 'weight')
    return layer


def hooked(register: str = 'register_forward_hook') -> nn.Module:
    layer = conv(3)
    getattr(layer, register)(lambda *_: None)
    return layer


def other(**options):
    """Make ``conv(...)`` of other options than the target's."""
    return lambda: conv(**options)


#: Layers that are no part of a 3x3 conv in their place, and what the error says.
REFUSED = {
    'group norm': (lambda: nn.GroupNorm(2, 4), 'GroupNorm without running statistics'),
    'layer norm': (lambda: nn.LayerNorm([7, 8]), 'LayerNorm without running'),
    'instance norm': (lambda: nn.InstanceNorm2d(4), 'InstanceNorm2d without running'),
    'batch norm of the batch': (
        lambda: nn.BatchNorm2d(4, track_running_stats=False),
        'BatchNorm2d without running statistics normalises by the statistics of its input',
    ),
    'activation': (nn.ReLU, 'ReLU'),
    'pooling': (lambda: nn.MaxPool2d(3, 1, 1), 'MaxPool2d'),
    'transposed conv': (lambda: nn.ConvTranspose2d(4, 4, 1), 'ConvTranspose2d is not'),
    'linear': (lambda: nn.Linear(8, 8), 'Linear is not known as a linear layer'),
    'standardised conv': (
        lambda: ConvWS2d(4, 4, 3, padding=1),
        'ConvWS2d has a forward of its own, and may not compute what Conv2d does',
    ),
    'own forward': (
        lambda: Swapped(4, 4, 3, padding=1),
        'Swapped has a forward of its own',
    ),
    'own kernel': (
        lambda: SwappedInside(4, 4, 3, padding=1),
        'SwappedInside has a forward',
    ),
    'own forward of a registered type': (
        lambda: SwappedWrapper(4, 4, 3, padding=1),
        'SwappedWrapper has a forward',
    ),
    'own forward of one layer': (own_forward, 'Conv2d has a forward of its own'),
    'own kernel of one layer': (own_conv_forward, 'Conv2d has a forward of its own'),
    'own forward of a norm': (lambda: Doubled(4), 'Doubled has a forward of its own'),
    'own forward of a sequence': (
        lambda: Skipping(conv(1), nn.BatchNorm2d(4)),
        'Skipping has a forward of its own',
    ),
    'own forward of the identity': (Negative, 'Negative has a forward of its own'),
    'hook': (hooked, 'Conv2d has a forward hook, which may change'),
    'hook beside one that prunes': (
        pruned_and_hooked,
        'Conv2d has a forward hook, which may change',
    ),
    'hook before': (
        lambda: hooked('register_forward_pre_hook'),
        'Conv2d has a forward hook, which may change',
    ),
    'mean of what is not padded': (
        lambda: nn.AvgPool2d(3, 1, 1, count_include_pad=False),
        'does not average over the padding',
    ),
    'mean of what is not padded, to one side': (
        lambda: nn.AvgPool2d(3, 1, (0, 1), count_include_pad=False),
        'does not average over the padding',
    ),
    'mean over an edge': (
        lambda: nn.AvgPool2d(2, (1, 2), ceil_mode=True),
        'averages fewer pixels at an edge',
    ),
    'scales of the last dimension': (lambda: LayerScale(4), "data_format='channels_last'"),
    'ConvModule with an act': (lambda: ConvModule(4, 4, 1), 'has an activation'),
    'ConvModule that pads by a layer': (
        lambda: ConvModule(4, 4, 1, padding=1, padding_mode='reflect', act_cfg=None),
        'ReflectionPad2d is not known as a linear layer',
    ),
    'more outputs': (lambda: nn.Conv2d(4, 8, 1), '8 outputs.* does not fit into'),
    'dilation between taps': (
        other(kernel_size=3, dilation=3, padding=3),
        'does not fit into',
    ),
    'even same': (other(kernel_size=2, padding='same'), 'even kernel pads unevenly'),
    'stride': (other(stride=2), 'does not fit into'),
    'dilation': (other(dilation=2, padding=2), 'does not fit into'),
    'padding mode': (other(padding_mode='reflect'), 'does not fit into'),
    'large kernel': (other(kernel_size=5), r'\(5, 5\) kernel .*does not fit into'),
    'off the target': (other(kernel_size=1, padding=2), r'first tap \(-2, -2\)'),
    'apart, over its far edge': (
        other(kernel_size=3, dilation=2, padding=1),
        'does not fit into',
    ),
    'over its far edge': (other(kernel_size=3, padding=0), r'first tap \(0, 0\)'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_refuses(name):
    """The error names the branch and the reason."""
    make, message = REFUSED[name]
    branches = {'fine': nn.BatchNorm2d(4), 'odd': nn.Sequential(make())}
    with pytest.raises(NotFoldableError, match=f'^odd: .*{message}'):
        fold_branches(branches, target())


@pytest.mark.parametrize(
    'kind', [kind for kind in fold._FOLDS if isinstance(kind, type)], ids=str
)
def test_refuses_a_forward_of_its_own_of_every_type(kind):
    own = type('Own', (kind,), {'forward': lambda self, x: x})
    layer = own.__new__(own)
    nn.Module.__init__(layer)
    with pytest.raises(NotFoldableError, match='Own has a forward of its own'):
        fold_branches({'branch': layer}, target())


@pytest.mark.parametrize(
    ('layers', 'message'),
    [
        ([conv(3, padding=0), conv(3, padding=0)], 'one must be 1x1, with stride 1 if'),
        ([conv(1), conv(3, padding=0)], 'does not fit into'),
        ([conv(1, stride=2), conv(3, padding=0)], 'one must be 1x1, with stride 1 if'),
        ([conv(3), conv(3)], 'only a 1x1 conv of stride 1 can stand before a padding'),
        ([conv(3), conv(1, padding=1)], 'only a 1x1 conv of stride 1 can stand before'),
        (
            [nn.ZeroPad2d(1), conv(3, padding_mode='reflect')],
            'a map that was padded or cropped before',
        ),
        (
            [conv(1, padding=1, padding_mode='reflect'), conv(3, padding_mode='reflect')],
            'a map that was padded or cropped before',
        ),
        (
            [nn.ZeroPad2d((0, 1, 0, 1)), Conv2dAdaptivePadding(4, 4, 3, stride=2)],
            'depends on the size of a map that was padded or cropped before',
        ),
        (
            [nn.ZeroPad2d(-1), Conv2dAdaptivePadding(4, 4, 3, stride=2)],
            'depends on the size of a map that was padded or cropped before',
        ),
        ([nn.ZeroPad2d(-1), conv(3, padding=2)], 'a map that was padded or cropped before'),
        ([nn.ZeroPad2d((0, 0, 1, -1)), conv(3)], 'a map that was padded or cropped before'),
        ([nn.ZeroPad2d((0, -1, 0, 0)), conv(3)], 'a map that was padded or cropped before'),
        ([nn.ZeroPad2d((0, 0, 0, -1)), conv(3)], 'a map that was padded or cropped before'),
        ([conv(1, stride=2), conv(1, padding=1)], 'of stride 1 can stand before a padding'),
        ([nn.BatchNorm2d(4), nn.ZeroPad2d(1), conv(3, padding=0)], 'pads with zeros'),
        ([conv(1, bias=True), conv(3)], 'pads with zeros the output of a layer with a'),
        (
            [conv(1, bias=True), nn.ZeroPad2d((0, 0, 1, -1)), conv(3, padding=0)],
            'pads with zeros',
        ),
        ([nn.BatchNorm2d(4), conv(3)], 'pads with zeros the output of a layer with a'),
        ([conv(1), nn.BatchNorm2d(4), conv(3)], 'pads with zeros'),
        ([conv(1, bias=True), conv(3, padding='same')], 'pads with zeros'),
        (
            [conv(1, bias=True), Conv2dAdaptivePadding(4, 4, 3, bias=False)],
            'pads with zeros',
        ),
    ],
)
def test_refuses_sequences(layers, message):
    with pytest.raises(NotFoldableError, match=f'^branch: .*{message}'):
        fold_branches({'branch': nn.Sequential(*layers)}, target())


@pytest.mark.parametrize('mode', ['reflect', 'replicate', 'circular'])
def test_bias_before_a_padding_that_repeats_pixels(mode):
    """What only a padding with zeros forbids."""
    branch = nn.Sequential(conv(1, bias=True), conv(3, padding_mode=mode))
    assert_folds({'branch': branch}, target(padding_mode=mode))


def test_bias_before_no_padding():
    branch = nn.Sequential(conv(1, bias=True), conv(3, padding=0))
    assert_folds({'branch': branch}, target(padding=(0, 0)))


def test_more_groups_than_the_branch_has():
    with pytest.raises(NotFoldableError, match='a conv of 1 groups cannot become one of 2'):
        fold_branches({'branch': conv(3)}, target(groups=2))


@pytest.mark.parametrize('branch', [conv(1, padding=1), conv(2, padding=2, dilation=3)])
def test_kernel_between_the_taps(branch):
    with pytest.raises(NotFoldableError, match=r'kernel .*does not fit into'):
        fold_branches({'branch': branch}, target(padding=(2, 2), dilation=(2, 2)))


@pytest.mark.parametrize('size', [(7, 8), (8, 7)], ids=str)
def test_an_even_extent_of_an_even_kernel(size):
    small, large = (Conv2dAdaptivePadding(4, 4, k, 2, dilation=2) for k in (2, 4))
    geometry = target(kernel_size=4, stride=(2, 2), dilation=(2, 2), padding_mode='same')
    assert_folds({'small': small, 'large': large}, geometry, image(2, 4, *size))


@pytest.mark.parametrize('size', [(7, 8), (8, 7)], ids=str)
@pytest.mark.parametrize(
    ('kernel_size', 'dilation', 'target_size', 'fits'),
    [
        (3, 1, 5, True),
        (2, 1, 4, True),
        (2, 2, 5, True),
        (3, 2, 5, True),
        (1, 1, 4, True),
        (2, 1, 5, False),
        (3, 1, 4, False),
        (2, 2, 4, False),
    ],
)
def test_a_kernel_that_moves_with_the_target(
    kernel_size, dilation, target_size, fits, size
):
    """Under 'SAME' padding and a stride, by the parity of its extent."""
    small = Conv2dAdaptivePadding(4, 4, kernel_size, 2, dilation=dilation)
    branches = {'small': small, 'large': Conv2dAdaptivePadding(4, 4, target_size, 2)}
    geometry = target(kernel_size=target_size, stride=(2, 2), padding_mode='same')
    if fits:
        assert_folds(branches, geometry, image(2, 4, *size))
    else:
        with pytest.raises(NotFoldableError, match=r'^small: .* does not fit into'):
            fold_branches(branches, geometry, size)


def test_dilation_of_a_single_tap_does_not_matter():
    branches = {'3x3': conv(3, dilation=2, padding=2), '1x1': conv(1)}
    assert_folds(branches, target(dilation=(2, 2), padding=(2, 2)))


def test_new_layer_type_by_registration():
    """A user's layer needs a function, and nothing of the package changes."""

    class Twice(nn.Module):
        def forward(self, x):
            return 2 * x + 1

    branch = nn.Sequential(conv(3, bias=True), Twice(), nn.BatchNorm2d(4))
    with pytest.raises(NotFoldableError, match=r'^branch: .*Twice'):
        fold_branches({'branch': branch}, target())

    @register_fold(Twice)
    def _(layer, partial):
        ones = torch.ones(partial.out_channels, dtype=partial.dtype)
        return partial.then_scale(2 * ones, ones)

    assert_folds({'branch': branch}, target())

    class Thrice(Twice):
        def forward(self, x):
            return 3 * x

    with pytest.raises(NotFoldableError, match='Thrice has a forward of its own'):
        fold_branches({'branch': nn.Sequential(conv(3), Thrice())}, target())


def test_new_conv_type_by_registration():
    class Rotated(Swapped):
        def forward(self, x):
            return super(Swapped, self).forward(x)

    layer = Rotated(4, 4, 3, padding=1, bias=False)
    with pytest.raises(NotFoldableError, match='Rotated has a forward of its own'):
        conv_geometry(layer)
    register_linear_conv(Rotated)
    assert conv_geometry(layer) == target()
    assert_folds({'branch': layer}, target())


def test_new_norm_type_by_registration():
    class Own(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x)

    unit = nn.Sequential(conv(3), Own(4))
    with pytest.raises(NotFoldableError, match='Own has a forward of its own'):
        fold_branches({'unit': unit}, target())
    register_fold(Own, eval_only=True)(fold_norm)
    assert_folds({'unit': unit}, target())


@pytest.mark.parametrize(
    'force',
    [
        conv,
        lambda: nn.BatchNorm2d(4),
        lambda: nn.SyncBatchNorm(4),
        lambda: nn.InstanceNorm2d(4, track_running_stats=True),
        lambda: FrozenBatchNorm2d(4),
        nn.Dropout,
        nn.Dropout1d,
        nn.Dropout2d,
        nn.AlphaDropout,
        DropPath,
    ],
)
def test_computes_as_folded(force):
    layer = force()
    mode_matters = not isinstance(layer, nn.Conv2d | FrozenBatchNorm2d)
    assert computes_as_folded(layer) is not mode_matters
    assert computes_as_folded(layer.eval())
    handle = layer.register_full_backward_hook(lambda *_: None)
    assert computes_as_folded(layer) is False
    handle.remove()
    assert computes_as_folded(layer)


def test_gradients_reach_every_parameter():
    branches = {
        'conv3x3': nn.Sequential(conv(3), nn.BatchNorm2d(4)),
        'norm': nn.BatchNorm2d(4),
        'two': nn.Sequential(conv(1), conv(3, bias=True)),
    }
    module = randomise(nn.ModuleDict(branches).double()).eval()
    x, geometry = image(2, 4, 6, 6), target()

    def gradients(y):
        return torch.autograd.grad((y * image(*y.shape)).sum(), module.parameters())

    one = fold_branches(branches, geometry)
    folded = geometry.convolve(x, one.weight, one.bias)
    direct = sum(branch(x) for branch in branches.values())
    assert_same(gradients(direct), gradients(folded))


def test_computes_at_least_in_float32_and_in_what_is_asked_for():
    half = nn.Sequential(conv(3), nn.BatchNorm2d(4)).half()
    for dtype, result in [(None, torch.float32), (torch.float64, torch.float64)]:
        folded = fold_branches({'half': half}, target(), dtype=dtype)
        assert [folded.weight.dtype, folded.bias.dtype] == [result] * 2
    for layer in (conv(3), nn.BatchNorm2d(4, affine=False)):
        double = fold_branches({'double': layer.double()}, target())
        assert double.weight.dtype == torch.float64
    # That of the parameters, not of the statistics.
    mixed = nn.BatchNorm2d(4)
    mixed.weight, mixed.bias = (nn.Parameter(p.double()) for p in mixed.parameters())
    assert fold_branches({'mixed': mixed}, target()).weight.dtype == torch.float64


@pytest.mark.parametrize('first', BRANCHES)
def test_changes_nothing(first):
    """No kernel is added into a parameter."""
    branches = {name: BRANCHES[name](2) for name in [first, *BRANCHES]}
    module = randomise(nn.ModuleList(branches.values()).double())
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with torch.no_grad():
        for chosen in (branches, {first: branches[first]}):
            fold_branches(chosen, target(groups=2), device='meta')
            fold_branches(chosen, target(groups=2))
    assert_same(before, module.state_dict(), tolerance=0)
    assert module.training


#: Branches, and whether the last layer of them has the kernel itself in its memory.
FRESH = {
    'conv': (lambda: conv(3), True),
    'average': (lambda: nn.AvgPool2d(3, 1, 1), True),
    'conv, identity': (lambda: nn.Sequential(conv(3), nn.Identity()), True),
    'conv, norm': (lambda: nn.Sequential(conv(3), nn.BatchNorm2d(4)), False),
    'conv, scale': (lambda: nn.Sequential(conv(3), Scale(2.0)), False),
    'norm': (lambda: nn.BatchNorm2d(4), False),
    'two convs': (lambda: nn.Sequential(conv(1), conv(3)), False),
}


@pytest.mark.parametrize('name', FRESH)
def test_copies_only_what_a_layer_may_have_in_its_memory(name):
    make, copied = FRESH[name]
    with Calls() as calls:
        fold_branches({name: make().eval()}, target())
    assert calls['clone'] == copied


def test_the_largest_kernel_is_added_up_where_it_is():
    """A kernel of zeros is made for a sum of smaller kernels only."""
    small, whole = conv(1, bias=True), conv(3, bias=True)
    for branches, zeros in (([small, whole], 0), ([whole, small], 0), ([small], 1)):
        with Calls() as calls:
            fold_branches(dict(zip('ab', branches, strict=False)), target())
        assert calls['new_zeros'] == zeros


class Folded(nn.ModuleDict):
    """Branches whose forward pass is their kernel."""

    def forward(self) -> Tensor:
        return fold_branches(self, target()).weight


def test_a_batch_of_kernels_of_one_branch():
    """Added to the single one of another."""
    module = randomise(Folded({'small': conv(2, padding=0), 'whole': conv(3)}).double())
    batch = image(3, *module['small'].weight.shape)

    def kernel(weight):
        return torch.func.functional_call(module, {'small.weight': weight}, ())

    assert_same(torch.stack([*map(kernel, batch)]), torch.func.vmap(kernel)(batch))


def test_check_on_the_meta_device_computes_nothing():
    """A conv of 8 TB, on the meta device, in no time and memory."""
    with torch.device('meta'):
        large = nn.Sequential(nn.Conv2d(1 << 20, 1 << 18, 3, padding=1))
    geometry = conv_geometry(large[0])
    assert fold_branches({'large': large}, geometry).weight.is_meta
    small = conv(3)
    folded = fold_branches({'small': small}, target(), device='meta')
    assert folded.weight.is_meta and folded.bias.is_meta
    assert small.weight.device.type == 'cpu'


@pytest.mark.parametrize(
    ('module', 'expected'),
    [
        (nn.BatchNorm2d(2), True),
        (nn.SyncBatchNorm(2), True),
        (nn.BatchNorm2d(2, affine=False), True),
        (nn.BatchNorm2d(2, track_running_stats=False), False),
        (nn.InstanceNorm2d(2), False),
        (nn.GroupNorm(1, 2), False),
        (nn.Conv2d(2, 2, 1), False),
    ],
    ids=str,
)
def test_has_running_statistics(module, expected):
    assert has_running_statistics(module) is expected


@pytest.mark.parametrize('missing', ['running_mean', 'running_var', 'eps'])
def test_a_layer_that_tracks_its_input_is_no_norm(missing):
    class Tracker(nn.Module):
        def __init__(self):
            super().__init__()
            self.eps = 0.1
            self.register_buffer('running_mean', torch.zeros(2))
            self.register_buffer('running_var', torch.ones(2))

    tracker = Tracker()
    assert has_running_statistics(tracker)
    assert norm_tensors(tracker)[3:] == (None, None)
    delattr(tracker, missing)
    assert not has_running_statistics(tracker)
    register_fold(Tracker)(fold_norm)
    with pytest.raises(NotFoldableError, match='Tracker without running statistics'):
        fold_branches({'branch': tracker}, target(2))


def test_paddings_of_a_border_add_up():
    branch = nn.Sequential(
        conv(1, padding=1, padding_mode='replicate'), conv(3, padding_mode='replicate')
    )
    geometry = target(kernel_size=5, padding=(3, 3), padding_mode='replicate')
    assert_folds({'branch': branch}, geometry)


def test_a_norm_that_was_told_not_to_use_its_statistics():
    """In eval mode an instance norm does as it is told, and a batch norm does not."""
    instance = nn.InstanceNorm2d(4, track_running_stats=True)
    batch = nn.BatchNorm2d(4)
    instance.track_running_stats = batch.track_running_stats = False
    assert_folds({'batch': nn.Sequential(conv(3), batch)}, target())
    with pytest.raises(NotFoldableError, match='InstanceNorm2d without running'):
        fold_branches({'instance': nn.Sequential(conv(3), instance)}, target())


def test_a_pruned_norm():
    """Of its weight now, not in the last forward pass."""
    unit = nn.Sequential(conv(3), nn.BatchNorm2d(4))
    prune.l1_unstructured(unit[1], 'weight', 0.5)
    unit(image(2, 4, 6, 6, dtype=torch.float32))
    assert_folds({'unit': unit}, target())


@pytest.mark.parametrize('kind', [FrozenBatchNorm2d, SyncBatchNorm])
def test_a_norm_of_another_package_by_its_name(kind, monkeypatch):
    """One that is not imported before somebody uses it."""
    # What mmcv's asks of the process group.
    monkeypatch.setattr(torch.distributed, 'get_world_size', lambda group: 1)
    unit = nn.Sequential(conv(3), kind(4))
    assert_folds({'unit': unit}, target())
    assert computes_as_folded(unit[1].train()) is (kind is FrozenBatchNorm2d)


@pytest.mark.parametrize(
    'force',
    [
        lambda conv: prune.l1_unstructured(conv, 'weight', 0.5),
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        parametrizations.spectral_norm,
    ],
    ids=['pruned', 'weight norm', 'spectral norm', 'parametrized'],
)
@pytest.mark.filterwarnings('ignore::FutureWarning')
def test_a_weight_that_is_made_of_others(force):
    """Of what they are now, not in the last forward pass; with gradients to them."""
    layer = conv(3).double()
    force(layer)
    unit = nn.Sequential(layer, nn.BatchNorm2d(4).double().eval())
    x = image(2, 4, 6, 6)
    unit(x)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(torch.rand_like(parameter))
    # In train mode spectral norms would move their estimate.
    state = copy.deepcopy(dict(unit.state_dict()))
    folded = fold_branches({'unit': unit}, target())
    assert layer.training
    assert_same(state, unit.state_dict(), tolerance=0)
    assert_same(unit.eval()(x), target().convolve(x, folded.weight, folded.bias))
    parameters = list(layer.parameters())
    probe = image(*folded.weight.shape, seed=3)
    gradients = torch.autograd.grad((folded.weight * probe).sum(), parameters)
    assert_differ(gradients[0], torch.zeros_like(gradients[0]))
