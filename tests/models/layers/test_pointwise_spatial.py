"""The two-layer branches of DBB: their gradients, and layers that take others' places."""

import copy

import pytest
import torch
import torch.nn.functional as F
from laws import (
    always_one_conv,
    assert_differ,
    assert_same,
    assert_same_step,
    image,
    randomise,
    step,
)
from mmcv.cnn import fuse_conv_bn
from mmengine.model import revert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from mmrep.models.blocks import DiverseBranchBlock
from mmrep.models.layers.pointwise_spatial import PointwiseSpatial
from mmrep.reparam import (
    NotFoldableError,
    branch_by_branch,
    conv_geometry,
    fold_branches,
)

BRANCHES = ('branch_1x1_kxk', 'branch_avg')
X = image(4, 4, 16, 16)
SAME = dict(type='Conv2dAdaptivePadding')

every_branch = pytest.mark.parametrize('name', BRANCHES)


def branch(name: str, **options) -> PointwiseSpatial:
    return getattr(randomise(DiverseBranchBlock(4, 4, **options).double()), name)


@every_branch
def test_gradients_in_eval_mode(name):
    """By finite differences, of second order, too: of the input and of every parameter."""
    module = branch(name, kernel_size=(3, 1)).eval()
    parameters = list(module.parameters())
    x = image(1, 4, 3, 2).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, *_: module(x), (x, *parameters), fast_mode=True
    )
    assert torch.autograd.gradgradcheck(
        lambda x, *_: module(x), (x, *parameters), fast_mode=True
    )


@every_branch
@pytest.mark.parametrize('kind', ['SyncBatchNorm', "mmengine's"])
def test_other_norms(name, kind):
    plain = branch(name)
    other = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    if kind == "mmengine's":
        other = revert_sync_batchnorm(other)
    calls = []
    other.norm1.register_forward_hook(lambda *_: calls.append(1))
    assert_same_step(step(plain, X), step(other, X))
    assert calls == [1]


@every_branch
def test_norms_without_statistics(name):
    module = branch(name, norm_cfg=dict(type='GN', num_groups=2))
    assert 'input' in step(module, X)['gradients']


class LowRank(nn.Module):
    """A conv and an update of low rank beside it, as LoRA has it."""

    def __init__(self, conv: nn.Module, rank: int = 2) -> None:
        super().__init__()
        self.conv = conv
        self.down = copy.deepcopy(conv)
        self.up = nn.Conv2d(conv.out_channels, conv.out_channels, 1, bias=False).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.up(self.down(x))


def low_rank(module: PointwiseSpatial) -> None:
    module.conv2 = LowRank(module.conv2)
    nn.init.zeros_(module.conv2.up.weight)


#: What takes the fast way from the second conv, and changes nothing of what it computes.
WATCHED = {
    'hook': lambda module: module.conv2.register_forward_hook(lambda *_: None),
    'backward hook': lambda module: module.conv2.register_full_backward_hook(
        lambda *_: None
    ),
    'low rank': low_rank,
    'patched': lambda module: setattr(module.conv2, 'forward', module.conv2.forward),
}
GEOMETRIES = {
    'size is kept': {},
    'stride': dict(stride=2),
    'stride 3': dict(stride=3),
    'stride 1, 3': dict(stride=(1, 3)),
    'more padding': dict(padding=3, stride=2),
    'dilation': dict(dilation=2, padding=(2, 1)),
    'reflect': dict(padding_mode='reflect'),
    'SAME': dict(conv_cfg=SAME),
    'SAME, stride': dict(conv_cfg=SAME, stride=2),
    'SAME, stride 3': dict(conv_cfg=SAME, stride=3),
}


class TestSecondConv:
    @pytest.mark.parametrize('geometry', GEOMETRIES)
    @pytest.mark.parametrize('watched', WATCHED)
    @pytest.mark.parametrize('training', [True, False])
    @pytest.mark.parametrize('size', [(15, 16), (16, 13)], ids=str)
    def test_that_is_replaced_or_watched(self, geometry, watched, training, size):
        """What is padded stays what the layers before make of a zero."""
        plain = branch('branch_1x1_kxk', **GEOMETRIES[geometry]).train(training)
        other = copy.deepcopy(plain)
        WATCHED[watched](other)
        x = image(2, 4, *size)
        expected, output = step(plain, x), step(other, x)
        for part in ('outputs', 'statistics'):
            assert_same(expected[part], output[part])
        assert_same(expected['gradients']['input'], output['gradients']['input'])

    def test_hooks_fire_once(self):
        module, seen = branch('branch_1x1_kxk'), []
        module.conv2.register_forward_hook(lambda *_: seen.append('forward'))
        module.conv2.register_full_backward_hook(lambda *_: seen.append('backward'))
        module(X).sum().backward()
        assert seen == ['forward', 'backward']

    def test_a_hook_that_changes_the_output_is_heard(self):
        module = branch('branch_1x1_kxk').eval()
        before = module(X)
        module.conv2.register_forward_hook(lambda layer, args, out: 2 * out)
        assert_differ(before, module(X))

    @pytest.mark.parametrize(
        'force', [parametrizations.spectral_norm, nn.utils.spectral_norm]
    )
    @pytest.mark.filterwarnings('ignore::FutureWarning')
    def test_a_spectral_norm_iterates_once(self, force):
        """Its vectors move in every forward pass in train mode, as without a block."""
        module = branch('branch_1x1_kxk')
        conv = copy.deepcopy(module.conv2)
        for layer in (module.conv2, conv):
            torch.manual_seed(3)
            force(layer)
        module(X)
        conv(X)
        moved = {
            key: value for key, value in module.conv2.state_dict().items() if '_u' in key
        }
        assert moved
        assert_same(moved, {key: conv.state_dict()[key] for key in moved})


def test_nothing_after_it_pads_with_its_response():
    module = branch('branch_1x1_kxk', kernel_size=1)
    after = nn.Sequential(module, nn.Conv2d(4, 4, 3, padding=1))
    target = conv_geometry(after[1])
    with pytest.raises(NotFoldableError, match='pads with zeros the output of a layer'):
        fold_branches({'branch': after}, target)


def test_statistics_that_are_lost():
    """As test-time adaptation loses them: such a norm uses the batch, in eval mode, too."""
    module = branch('branch_1x1_kxk').eval()
    module.norm1.running_mean = module.norm1.running_var = None
    u = F.batch_norm(
        module.conv1(X), None, None, module.norm1.weight, module.norm1.bias, True
    )
    assert_same(module.norm2(module.conv2(u)), module(X))


@pytest.mark.parametrize('geometry', ['size is kept', 'stride', 'SAME'])
@pytest.mark.parametrize('training', [True, False])
def test_convs_with_a_bias(geometry, training):
    """As somebody's who puts other convs in their place."""
    module = branch('branch_1x1_kxk', internal_channels=8, **GEOMETRIES[geometry])
    for conv in (module.conv1, module.conv2):
        conv.bias = nn.Parameter(image(conv.out_channels, seed=3))
    module.train(training)
    slow = copy.deepcopy(module)
    slow.conv2.register_forward_hook(lambda *_: None)
    x = image(2, 4, 9, 8)
    assert_same(slow(x), module(x))
    block = DiverseBranchBlock(4, 4, internal_channels=8, **GEOMETRIES[geometry]).double()
    block.branch_1x1_kxk = module
    if not training:
        randomise(block).eval()
        with branch_by_branch(block):
            expected = block(x)
        with always_one_conv(block):
            assert_same(expected, block(x))


@pytest.mark.parametrize('one_conv', [True, False])
def test_norms_that_mmcv_has_fused(one_conv):
    """Its ``fuse_conv_bn`` leaves a bias in the conv, and no norm."""
    block = randomise(DiverseBranchBlock(4, 4, one_conv=one_conv).double()).eval()
    x = image(2, 4, 9, 8)
    expected = block(x)
    fused = fuse_conv_bn(copy.deepcopy(block))
    assert isinstance(fused.branch_avg.norm1, nn.Identity)
    assert_same(expected, fused(x))
    fused.switch_to_deploy()
    assert_same(expected, fused(x))
