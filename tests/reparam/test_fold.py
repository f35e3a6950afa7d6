import copy

import pytest
import torch
import torch.nn.functional as F
from geometries import conv_options
from hypothesis import given
from hypothesis import strategies as st
from laws import (
    assert_deploy_equivalent,
    assert_differ,
    assert_same,
    image,
    randomise,
)
from mmcv.cnn.bricks import Conv2d as MMCVConv2d
from mmcv.cnn.bricks import Conv2dAdaptivePadding
from mmcv.cnn.bricks.conv_ws import ConvWS2d
from mmengine.registry import MODELS as HOST_MODELS
from torch import nn
from torch.nn.utils import parametrizations, prune

from mmrep.models.blocks import DiverseBranchBlock, RepVGGBlock
from mmrep.reparam import (
    ConvGeometry,
    NotFoldableError,
    branch_by_branch,
    conv2d_geometry,
    conv_geometry,
    fold_branches,
    fold_layer,
    has_running_statistics,
)


def frame(channels: int = 4, kernel_size: int = 3, **options) -> ConvGeometry:
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
    weight, bias = fold_branches(branches, geometry, tuple(x.shape[2:]))
    expected = sum(branch(x) for branch in branches.values())
    assert_same(expected, geometry.convolve(x, weight, bias))


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
}


@pytest.mark.parametrize('groups', [1, 2, 4])
@pytest.mark.parametrize('name', BRANCHES)
def test_branch_in_a_3x3_frame(name, groups):
    assert_folds({name: BRANCHES[name](groups)}, frame(groups=groups))


@pytest.mark.parametrize('groups', [1, 2, 4])
def test_sum_of_branches(groups):
    branches = {name: make(groups) for name, make in BRANCHES.items()}
    assert_folds(branches, frame(groups=groups))
    assert_folds(branches, frame(kernel_size=5, groups=groups))


@pytest.mark.parametrize('groups', [1, 2, 4])
def test_branch_without_tensors(groups):
    """A plain shortcut beside a conv."""
    branches = {'shortcut': nn.Identity(), 'conv': conv(3, groups=groups)}
    assert_folds(branches, frame(groups=groups))


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


def other(**options):
    """Make ``conv(...)`` of other options than the frame's."""
    return lambda: conv(**options)


#: Layers that are no part of a 3x3 conv in their place, and what the error says.
REFUSED = {
    'group norm': (lambda: nn.GroupNorm(2, 4), 'GroupNorm without running statistics'),
    'layer norm': (lambda: nn.LayerNorm([7, 8]), 'LayerNorm without running'),
    'instance norm': (lambda: nn.InstanceNorm2d(4), 'InstanceNorm2d without running'),
    'batch norm of the batch': (
        lambda: nn.BatchNorm2d(4, track_running_stats=False),
        'BatchNorm2d without running statistics normalises by its input',
    ),
    'activation': (nn.ReLU, 'ReLU'),
    'pooling': (lambda: nn.MaxPool2d(3, 1, 1), 'MaxPool2d'),
    'transposed conv': (lambda: nn.ConvTranspose2d(4, 4, 1), 'ConvTranspose2d is no'),
    'linear': (lambda: nn.Linear(8, 8), 'Linear is no conv with a known, fixed'),
    'standardised conv': (
        lambda: ConvWS2d(4, 4, 3, padding=1),
        'ConvWS2d does not convolve with its weight as Conv2d does',
    ),
    'own forward': (lambda: Swapped(4, 4, 3, padding=1), 'Swapped does not'),
    'own kernel': (lambda: SwappedInside(4, 4, 3, padding=1), 'SwappedInside does not'),
    'own forward of a registered type': (
        lambda: SwappedWrapper(4, 4, 3, padding=1),
        'SwappedWrapper does not',
    ),
    'even same': (other(kernel_size=2, padding='same'), 'even kernel pads unevenly'),
    'stride': (other(stride=2), 'does not fit into the frame'),
    'dilation': (other(dilation=2, padding=2), 'does not fit into the frame'),
    'groups': (other(groups=2), 'does not fit into the frame'),
    'padding mode': (other(padding_mode='reflect'), 'does not fit into the frame'),
    'large kernel': (other(kernel_size=5), r'\(5, 5\) kernel does not fit into'),
    'off the frame': (other(kernel_size=1, padding=2), r'at tap \(-1, -1\)'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_refuses(name):
    """The error names the branch and the reason."""
    make, message = REFUSED[name]
    branches = {'fine': nn.BatchNorm2d(4), 'odd': nn.Sequential(make())}
    with pytest.raises(NotFoldableError, match=f'^odd: .*{message}'):
        fold_branches(branches, frame())


@pytest.mark.parametrize(
    ('layers', 'message'),
    [
        ([conv(3), conv(1)], 'only a 1x1 conv of stride 1 can stand before another'),
        ([conv(1, stride=2), conv(3)], 'only a 1x1 conv of stride 1'),
        ([conv(1, groups=2), conv(3)], 'convs of 2 and 1 groups follow each other'),
        ([conv(1, bias=True), conv(3)], 'pads with zeros what a layer with a bias'),
        ([nn.BatchNorm2d(4), conv(3)], 'pads with zeros what a layer with a bias'),
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
        fold_branches({'branch': nn.Sequential(*layers)}, frame())


@pytest.mark.parametrize('mode', ['reflect', 'replicate', 'circular'])
def test_bias_before_a_padding_that_repeats_pixels(mode):
    """What only a padding with zeros forbids."""
    branch = nn.Sequential(conv(1, bias=True), conv(3, padding_mode=mode))
    assert_folds({'branch': branch}, frame(padding_mode=mode))


def test_bias_before_no_padding():
    branch = nn.Sequential(conv(1, bias=True), conv(3, padding=0))
    assert_folds({'branch': branch}, frame(padding=(0, 0)))


def test_kernel_between_the_taps():
    with pytest.raises(NotFoldableError, match=r'\(1, 1\) kernel falls between the taps'):
        fold_branches(
            {'branch': conv(1, padding=1)}, frame(padding=(2, 2), dilation=(2, 2))
        )


def test_dilation_of_a_single_tap_does_not_matter():
    branches = {'3x3': conv(3, dilation=2, padding=2), '1x1': conv(1)}
    assert_folds(branches, frame(dilation=(2, 2), padding=(2, 2)))


def test_new_layer_type_by_registration():
    """A user's layer needs a function, and nothing of the package changes."""

    class Twice(nn.Module):
        def forward(self, x):
            return 2 * x

    branch = nn.Sequential(conv(3, bias=True), Twice(), nn.BatchNorm2d(4))
    with pytest.raises(NotFoldableError, match=r'^branch: .*Twice'):
        fold_branches({'branch': branch}, frame())

    @fold_layer.register(Twice)
    def _(layer, done):
        return done._replace(weight=2 * done.weight, bias=2 * done.bias)

    assert_folds({'branch': branch}, frame())


def test_new_conv_type_by_registration():
    class Flipped(Swapped):
        pass

    layer = Flipped(4, 4, 3, padding=1, bias=False)
    with pytest.raises(NotFoldableError, match='Flipped does not convolve with its weight'):
        conv_geometry(layer)
    conv_geometry.register(Flipped, conv2d_geometry)
    assert conv_geometry(layer) == frame()


def test_gradients_reach_every_parameter():
    branches = {
        'conv3x3': nn.Sequential(conv(3), nn.BatchNorm2d(4)),
        'norm': nn.BatchNorm2d(4),
        'two': nn.Sequential(conv(1), conv(3, bias=True)),
    }
    module = randomise(nn.ModuleDict(branches).double()).eval()
    x, geometry = image(2, 4, 6, 6), frame()

    def gradients(y):
        return torch.autograd.grad((y * image(*y.shape)).sum(), module.parameters())

    folded = geometry.convolve(x, *fold_branches(branches, geometry))
    direct = sum(branch(x) for branch in branches.values())
    assert_same(gradients(direct), gradients(folded))


def test_computes_at_least_in_float32_and_in_what_is_asked_for():
    half = nn.Sequential(conv(3), nn.BatchNorm2d(4)).half()
    for dtype, result in [(None, torch.float32), (torch.float64, torch.float64)]:
        folded = fold_branches({'half': half}, frame(), dtype=dtype)
        assert [tensor.dtype for tensor in folded] == [result] * 2
    assert fold_branches({'double': conv(3).double()}, frame())[0].dtype == torch.float64


@pytest.mark.parametrize('first', BRANCHES)
def test_changes_nothing(first):
    """No kernel is added into a parameter."""
    branches = {name: BRANCHES[name](2) for name in [first, *BRANCHES]}
    module = randomise(nn.ModuleList(branches.values()).double())
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with torch.no_grad():
        for chosen in (branches, {first: branches[first]}):
            fold_branches(chosen, frame(groups=2), device='meta')
            fold_branches(chosen, frame(groups=2))
    assert_same(before, module.state_dict(), tolerance=0)
    assert module.training


def test_check_on_the_meta_device_computes_nothing():
    """A conv of 8 TB, on the meta device, in no time and memory."""
    with torch.device('meta'):
        large = nn.Sequential(nn.Conv2d(1 << 20, 1 << 18, 3, padding=1))
    geometry = conv_geometry(large[0])
    assert fold_branches({'large': large}, geometry)[0].is_meta
    small = conv(3)
    weight, bias = fold_branches({'small': small}, frame(), device='meta')
    assert weight.is_meta and bias.is_meta and small.weight.device.type == 'cpu'


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


class OwnForward(nn.BatchNorm2d):
    """A norm of a user: the same function as a batch norm, times a factor."""

    factor = 1

    def forward(self, x):
        return self.factor * super().forward(x)


class Doubled(OwnForward):
    factor = 2


class NoTensors(nn.Module):
    """A norm that has statistics and nothing else."""

    def __init__(self, channels: int, eps: float = 0.1) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer('running_mean', torch.full((channels,), 2.0))
        self.register_buffer('running_var', torch.full((channels,), 3.0))

    def forward(self, x):
        mean, var = (s.reshape(-1, 1, 1) for s in (self.running_mean, self.running_var))
        return (x - mean) / (var + self.eps).sqrt()


class TestNormsWithForwardsOfTheirOwn:
    @pytest.mark.parametrize('norm', [OwnForward, NoTensors])
    def test_the_same_function(self, norm):
        unit = randomise(nn.Sequential(conv(3), norm(4)).double()).eval()
        fold_branches({'unit': unit}, frame(), device='meta')
        x = image(2, 4, 6, 6)
        assert_same(unit(x), frame().convolve(x, *fold_branches({'unit': unit}, frame())))

    @pytest.mark.parametrize('training', [True, False])
    def test_another_function(self, training):
        unit = randomise(nn.Sequential(conv(3), Doubled(4)).double()).train(training)
        with pytest.raises(NotFoldableError, match='unit: Doubled has running statistics'):
            fold_branches({'unit': unit}, frame(), device='meta')
        assert unit[1].training is training

    def test_in_a_block(self):
        block = randomise(RepVGGBlock(4, 4).double()).eval()
        block.branch_norm = Doubled(4).double().eval()
        x = image(2, 4, 200, 200)
        with branch_by_branch(block):
            expected = block(x)
        assert_same(expected, block(x))
        with pytest.raises(NotFoldableError, match='branch_norm: Doubled'):
            block.switch_to_deploy()
        assert not block.deploy

    def test_one_that_only_seems_another_by_rounding(self):
        unit = nn.Sequential(conv(3), OwnForward(4)).half().eval()
        unit[1].running_mean.fill_(50)
        unit[1].running_var.fill_(0)
        fold_branches({'unit': unit}, frame(), device='meta')

    def test_one_that_cannot_be_tried_out(self):
        class Elsewhere(nn.BatchNorm2d):
            def forward(self, x):
                raise RuntimeError('not on this device')

        unit = nn.Sequential(conv(3), Elsewhere(4))
        with pytest.raises(NotFoldableError, match=r'Elsewhere .*not on this device'):
            fold_branches({'unit': unit}, frame(), device='meta')

    def test_hooks_see_nothing_of_it(self):
        unit, seen = nn.Sequential(conv(3), OwnForward(4)), []
        unit[1].register_forward_hook(lambda *_: seen.append(1))
        fold_branches({'unit': unit}, frame(), device='meta')
        assert not seen

    def test_of_a_norm_without_scale_and_shift_in_a_two_layer_branch(self, monkeypatch):
        monkeypatch.setitem(HOST_MODELS._module_dict, 'NoTensors', NoTensors)
        block = DiverseBranchBlock(4, 4, 3, norm_cfg=dict(type='NoTensors'))
        assert_deploy_equivalent(block.double(), image(2, 4, 8, 8))


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
    weight, bias = fold_branches({'unit': unit}, frame())
    assert layer.training
    assert_same(state, unit.state_dict(), tolerance=0)
    assert_same(unit.eval()(x), frame().convolve(x, weight, bias))
    parameters = list(layer.parameters())
    probe = image(*weight.shape, seed=3)
    gradients = torch.autograd.grad((weight * probe).sum(), parameters)
    assert_differ(gradients[0], torch.zeros_like(gradients[0]))


class TestConvGeometry:
    @given(conv_options())
    def test_convolves_as_the_conv_does(self, options):
        size = options.pop('size')
        layer = nn.Conv2d(**options, dtype=torch.float64)
        x = image(2, options['in_channels'], *size)
        y = conv_geometry(layer).convolve(x, layer.weight, layer.bias)
        assert_same(layer(x), y)

    @given(conv_options(), st.integers(1, 9), st.integers(1, 9))
    def test_same_is_mmcvs_adaptive_padding(self, options, height, width):
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
    def test_same_pads_by_the_parity_of_the_input(self, size, pad):
        geometry = frame(stride=(2, 2), padding_mode='same')
        assert geometry.moves_with_size
        assert geometry.pad(size) == pad
        assert geometry.start(size) == (-pad[0][0], -pad[1][0])

    def test_same_with_a_stride_needs_the_size(self):
        with pytest.raises(NotFoldableError, match='run one forward pass first, or give'):
            frame(stride=(2, 1), padding_mode='same').pad()

    def test_same_with_stride_1_does_not(self):
        geometry = frame(kernel_size=5, padding_mode='same')
        assert not geometry.moves_with_size
        assert geometry.pad() == geometry.pad((9, 4)) == ((2, 2), (2, 2))

    def test_padding_in_words(self):
        wide = conv_geometry(conv((5, 3), padding='same', dilation=(1, 2)))
        assert wide.padding == (2, 2)
        assert conv_geometry(conv(3, padding='valid')).padding == (0, 0)
