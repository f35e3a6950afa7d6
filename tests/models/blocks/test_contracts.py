"""What every block promises, whatever its branches are.

A new type of block gets all of it for one line in ``BLOCKS``.
"""

import copy
import itertools
import math
import operator
import pickle
import warnings
from collections import OrderedDict

import pytest
import torch
from laws import (
    always_one_conv,
    assert_deploy_equivalent,
    assert_differ,
    assert_one_conv_exact,
    assert_same,
    assert_same_step,
    count_convs,
    image,
    kept_maps,
    randomise,
    running_statistics,
    step,
)
from mmcv import ops
from mmcv.cnn import ConvModule
from mmcv.cnn.bricks import Conv2dAdaptivePadding
from mmcv.cnn.bricks.conv_ws import ConvWS2d
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from mmrep.models.blocks import (
    AsymmetricConvBlock,
    BranchBlock,
    ConvNormBlock,
    DilatedReparamBlock,
    DiverseBranchBlock,
    LargeKernelBlock,
    MobileOneBlock,
    OREPABlock,
    OREPARepVGGBlock,
    QARepVGGBlock,
    RepVGGBlock,
    ScaleSumBlock,
)
from mmrep.models.blocks.base import ReparamBlock
from mmrep.models.layers import IdentityConv1x1
from mmrep.reparam import NotFoldableError, branch_by_branch, switch_to_deploy

SE = dict(ratio=2, divisor=1)
SAME = dict(type='Conv2dAdaptivePadding')

SMALL = dict(small_kernel=1)
BRANCHES = dict(
    branches=(
        *('kxk', '1x3', '1x1', 'avg', 'identity'),
        *(dict(kernel_size=1, norm=False), dict(type='mmrep.AsymmetricConvBlock')),
    ),
    post_norm=True,
)

#: Blocks between 4 and 4 channels, with ``**options``.
BLOCKS = {
    'repvgg': lambda **options: RepVGGBlock(4, 4, **options),
    'repvgg se': lambda **options: RepVGGBlock(4, 4, **{'se_cfg': SE, **options}),
    'dbb': lambda **options: DiverseBranchBlock(4, 4, 3, **options),
    'dbb depthwise': lambda **options: DiverseBranchBlock(4, 4, 3, groups=4, **options),
    'conv and norm': lambda **options: ConvNormBlock(4, 4, 3, **options),
    'asymmetric': lambda **options: AsymmetricConvBlock(4, 4, 3, **options),
    'mobileone': lambda **options: MobileOneBlock(4, 4, 3, 2, **options),
    'qarepvgg': lambda **options: QARepVGGBlock(4, 4, 3, **options),
    'orepa': lambda **options: OREPABlock(4, 4, 3, **options),
    'orepa repvgg': lambda **options: OREPARepVGGBlock(4, 4, 3, **options),
    'large kernel': lambda **options: LargeKernelBlock(4, 4, 3, **SMALL | options),
    'branches': lambda **options: BranchBlock(4, 4, 3, **BRANCHES | options),
    'scale sum': lambda **options: ScaleSumBlock(4, 4, 3, **options),
    'dilated depthwise': lambda **options: DilatedReparamBlock(
        4, 4, 5, groups=4, post_norm=True, **options
    ),
}
FORMS = ('train', 'eval', 'deploy')
old_torch = tuple(map(int, torch.__version__.split('.')[:2])) < (2, 5)

every_block = pytest.mark.parametrize('name', BLOCKS)
every_form = pytest.mark.parametrize('form', FORMS)
#: Compiling takes a second or more: of the others `make check` tries it.
compiled_block = pytest.mark.parametrize(
    'name',
    [
        n if n in ('repvgg', 'dbb', 'branches') else pytest.param(n, marks=pytest.mark.long)
        for n in BLOCKS
    ],
)
multi_branch = pytest.mark.parametrize('name', [n for n in BLOCKS if n != 'conv and norm'])


def build(name: str, form: str = 'train', dtype=torch.float64, **options) -> ReparamBlock:
    """A drawn block in one of its forms."""
    block = randomise(BLOCKS[name](**options).to(dtype)).train(form == 'train')
    if form == 'deploy':
        block.switch_to_deploy()
    return block


def parts(block: ReparamBlock) -> set[str]:
    """What a block is made of."""
    return {child for child, _ in block.named_children()}


#: Options that change what a block computes. Each is tried with each block.
OPTIONS = {
    'none': {},
    'stride 2': dict(stride=2),
    'dilation 2': dict(dilation=2, padding=2),
    'dilation 1, 2': dict(dilation=(1, 2), padding=(1, 2)),
    'reflect': dict(padding_mode='reflect'),
    'replicate': dict(padding_mode='replicate'),
    'circular': dict(padding_mode='circular'),
    'reflect, more padding': dict(padding_mode='reflect', padding=2),
    'circular, less padding': dict(padding_mode='circular', padding=0),
    'no padding': dict(padding=0),
    'more padding': dict(padding=2),
    'other padding per side': dict(padding=(0, 3)),
    'dilation without padding': dict(dilation=2, padding=1),
    'se before act': dict(se_cfg=SE, act_cfg=dict(type='ReLU')),
    'se after act': dict(
        se_cfg=SE, se_position='after_act', act_cfg=dict(type='LeakyReLU')
    ),
    'no act': dict(act_cfg=None),
    'act without in place': dict(act_cfg=dict(type='GELU')),
    'act with parameters': dict(act_cfg=dict(type='PReLU')),
    'BN2d': dict(norm_cfg=dict(type='BN2d')),
    'SyncBN': dict(norm_cfg=dict(type='SyncBN', requires_grad=True)),
    'norm without scale': dict(norm_cfg=dict(type='BN', affine=False)),
    'eps': dict(norm_cfg=dict(type='BN', eps=0.3)),
    'momentum': dict(norm_cfg=dict(type='BN', momentum=0.5)),
    'frozen norm': dict(norm_cfg=dict(type='BN', requires_grad=False)),
    'with_cp': dict(with_cp=True),
    "mmcv's conv": dict(conv_cfg=dict(type='Conv')),
}


@every_block
@pytest.mark.parametrize('option', OPTIONS)
def test_deploy_form(name, option):
    block = BLOCKS[name](**OPTIONS[option]).double()
    deployed = assert_deploy_equivalent(block, image(2, 4, 8, 9))
    # A model that is built in deploy form has the same keys.
    built = BLOCKS[name](**OPTIONS[option], deploy=True).double().eval()
    built.load_state_dict(deployed.state_dict())
    x = image(1, 4, 9, 8)
    assert_same(deployed(x), built(x))
    assert parts(built) == parts(deployed)


@every_block
@pytest.mark.parametrize('option', OPTIONS)
def test_branch_kernels_add_up(name, option):
    block = build(name, 'eval', **OPTIONS[option])
    kernels = block.branch_kernels()
    assert kernels.keys() == block.branches().keys()
    weight, _ = block.equivalent_kernel_bias()
    assert_same(weight, sum(kernels.values()), 1e-12)
    assert all(kernel.any() for kernel in kernels.values())
    block.switch_to_deploy()
    assert block.branch_kernels() == {}


@multi_branch
@pytest.mark.parametrize('option', OPTIONS)
def test_one_conv_in_the_train_form(name, option):
    """Where no norm uses the batch: the same outputs and gradients to all branches."""
    assert_one_conv_exact(BLOCKS[name](**OPTIONS[option]).double(), image(2, 4, 8, 9))


@every_block
def test_float32(name):
    assert_deploy_equivalent(BLOCKS[name](), image(2, 4, 8, 9, dtype=torch.float32))


@pytest.fixture
def process_group(tmp_path):
    """A world of one process, without which mmcv's own SyncBN is not built."""
    distributed.init_process_group(
        'gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


@multi_branch
def test_mmcvs_own_sync_bn(process_group, name):
    block, x = BLOCKS[name](norm_cfg=dict(type='MMSyncBN')).double(), image(2, 4, 8, 9)
    assert any(isinstance(module, ops.SyncBatchNorm) for module in block.modules())
    assert_one_conv_exact(block, x)
    with branch_by_branch(block):
        expected = block(x)
    block.switch_to_deploy()
    assert_same(expected, block(x))


class TestOneConv:
    x = image(4, 4, 16, 16)

    #: A DBB's kernels are merged by a conv of their own.
    @pytest.mark.parametrize(('kind', 'one'), [(RepVGGBlock, 1), (DiverseBranchBlock, 2)])
    def test_is_used_where_it_pays(self, kind, one):
        """By the output pixels of the batch, unless somebody says it."""
        for stride, size in ((1, 20), (2, 40)):
            enough, fewer = image(1, 4, size, size), image(1, 4, size, size - stride)
            block = randomise(kind(4, 4, stride=stride).double()).eval()
            assert count_convs(block, enough) == one
            assert count_convs(block, fewer) > one
            block.one_conv = 100
            assert count_convs(block, image(1, 4, size // 2, size // 2)) == one
            assert count_convs(block, image(1, 4, size // 2, size // 2 - stride)) > one
            assert count_convs(block, image(2, 4, size // 2, size // 4)) == one
            for always in (True, 0):
                block.one_conv = always
                assert count_convs(block, image(1, 4, 3, 3)) == one

    def test_refuses(self):
        with pytest.raises(ValueError, match="one_conv must be True, False, 'auto' or a"):
            RepVGGBlock(4, 4, one_conv='always')

    @pytest.mark.parametrize('form', ['train', 'eval'])
    def test_can_be_forbidden(self, form):
        block = build('repvgg', form, one_conv=False)
        with always_one_conv(block):
            assert count_convs(block, self.x) == 2

    def test_norm_eval_while_training(self):
        block = build('dbb').train()
        for module in block.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        with branch_by_branch(block):
            reference = step(block, self.x)
        with always_one_conv(block):
            assert count_convs(block, self.x) == 2
            assert_same_step(reference, step(block, self.x))

    @multi_branch
    def test_not_where_one_norm_uses_the_batch(self, name):
        for norm in ('branch_norm', 'branch_avg.norm2', 'branch_1x1_kxk.norm1'):
            block = build(name, 'eval')
            if norm not in dict(block.named_modules()):
                continue
            block.get_submodule(norm).train()
            before = running_statistics(block)
            with always_one_conv(block):
                output = step(block, self.x)
            assert_differ(
                before[f'{norm}.running_mean'], output['statistics'][f'{norm}.running_mean']
            )
            twin = build(name, 'eval', one_conv=False)
            twin.get_submodule(norm).train()
            assert_same_step(step(twin, self.x), output)

    def test_a_frozen_block_passes_the_gradient_on(self):
        block = build('dbb', 'eval').requires_grad_(False)
        with branch_by_branch(block):
            reference = step(block, self.x)
        assert reference['gradients'].keys() == {'input'}
        assert_same_step(reference, step(block, self.x))

    @pytest.mark.parametrize('kind', ['data', 'in place', 'load_state_dict', 'optimizer'])
    @multi_branch
    def test_follows_every_change(self, name, kind):
        """Nothing is cached: a change by any door shows in the next forward pass."""
        block = build(name, 'eval')
        tensors = dict(block.named_parameters()) | running_statistics_by_reference(block)
        other = build(name, 'eval')
        randomise(other, seed=7)
        with always_one_conv(block), torch.no_grad():
            before = block(self.x)
            if kind == 'data':
                for key, tensor in tensors.items():
                    tensor.data = other.state_dict()[key].clone()
            elif kind == 'in place':
                for key, tensor in tensors.items():
                    tensor.copy_(other.state_dict()[key])
            elif kind == 'load_state_dict':
                block.load_state_dict(other.state_dict())
            else:
                for key, parameter in block.named_parameters():
                    parameter.grad = parameter - other.state_dict()[key]
                torch.optim.SGD(block.parameters(), lr=1.0).step()
                block.load_state_dict(
                    {k: v for k, v in other.state_dict().items() if 'running' in k},
                    strict=False,
                )
            after = block(self.x)
        assert_differ(before, after)
        with torch.no_grad(), branch_by_branch(other):
            assert_same(other(self.x), after)


def running_statistics_by_reference(block: nn.Module) -> dict[str, torch.Tensor]:
    """The running statistics themselves."""
    return {key: b for key, b in block.named_buffers() if 'running' in key}


class TestEquivalentKernelBias:
    @every_block
    def test_is_pure_and_differentiable(self, name):
        block = build(name)
        state = copy.deepcopy(block.state_dict())
        weight, bias = block.equivalent_kernel_bias()
        (weight.square().sum() + bias.square().sum()).backward()
        assert_same(state, block.state_dict(), tolerance=0)
        for branch in block.branches().values():
            assert all(p.grad.norm() > 0 for p in branch.parameters())
        assert block.training

    @every_block
    @every_form
    def test_is_the_conv(self, name, form):
        block = build(name, 'eval')
        x = image(2, 4, 6, 7)
        with branch_by_branch(block):
            expected = sum(branch(x) for branch in block.branches().values())
        if block.post_norm is not None:
            expected = block.post_norm(expected)
        if form == 'deploy':
            block.switch_to_deploy()
        weight, bias = block.equivalent_kernel_bias()
        kernel_size, groups = block.kernel_size, block.groups
        assert weight.shape == (4, 4 // groups, *kernel_size)
        padding = kernel_size[0] // 2
        y = torch.nn.functional.conv2d(x, weight, bias, padding=padding, groups=groups)
        assert_same(expected, y)

    @every_form
    def test_has_the_dtype_and_device_asked_for(self, form):
        block = build('dbb', form, dtype=torch.float32)
        for tensor in block.equivalent_kernel_bias(dtype=torch.float64, device='meta'):
            assert tensor.dtype == torch.float64
            assert tensor.is_meta

    def test_is_not_touched_by_autocast(self):
        block = build('dbb', dtype=torch.float32)
        expected = block.equivalent_kernel_bias()
        with torch.autocast('cpu', torch.bfloat16):
            inside = block.equivalent_kernel_bias()
        assert all(map(torch.equal, expected, inside))


@every_block
class TestSwitch:
    def test_leaves_the_conv_the_se_layer_and_the_act(self, name):
        block = build(name, 'deploy', act_cfg=dict(type='ReLU'))
        expected = {block.reparam_name, 'act'}
        assert parts(block) == expected | ({'se_layer'} if block.se_cfg else set())
        assert block.deploy
        assert block.branches() == {}

    def test_copies_the_geometry(self, name):
        options = dict(padding_mode='reflect', stride=(1, 2), padding=(2, 3), dilation=2)
        conv = build(name, 'deploy', **options).main_conv
        assert conv.padding_mode == 'reflect'
        assert conv.stride == (1, 2)
        assert conv.padding == (2, 3)
        assert conv.dilation == (2, 2)
        assert conv.groups == (4 if 'depthwise' in name else 1)
        assert conv.bias is not None

    @pytest.mark.parametrize('training', [True, False])
    @pytest.mark.parametrize('requires_grad', [True, False])
    def test_keeps_mode_and_requires_grad(self, name, training, requires_grad):
        block = build(name).train(training).requires_grad_(requires_grad)
        block.switch_to_deploy()
        before = list(block.parameters())
        block.switch_to_deploy()
        assert all(map(operator.is_, before, block.parameters()))
        assert {m.training for m in block.modules()} == {training}
        assert {p.requires_grad for p in block.parameters()} == {requires_grad}
        assert all(p.is_leaf for p in block.parameters())

    @pytest.mark.parametrize('layout', ['contiguous', 'channels last'])
    def test_conv_is_made_of_its_weights_alone(self, name, layout):
        """No random number is drawn, and nothing stays on the meta device."""
        block = build(name, dtype=torch.float32)
        memory_format = torch.contiguous_format
        if layout == 'channels last':
            memory_format = torch.channels_last
            block.to(memory_format=memory_format)
        before = torch.get_rng_state()
        block.switch_to_deploy()
        assert torch.equal(torch.get_rng_state(), before)
        conv = block.main_conv
        for tensor in (*conv.parameters(), *block.state_dict().values()):
            assert tensor.device.type == 'cpu'
            assert tensor.dtype == torch.float32
        assert conv.weight.is_contiguous(memory_format=memory_format)
        assert conv.bias.is_contiguous()

    def test_of_what_cannot_be_fused_changes_nothing(self, name):
        block = BLOCKS[name](norm_cfg=dict(type='GN', num_groups=2))
        before = parts(block)
        with pytest.raises(
            NotFoldableError,
            match=r'^(branch_[\w.]+|lkb_origin|post_norm): .*GroupNorm without running',
        ):
            block.switch_to_deploy()
        assert parts(block) == before
        assert not block.deploy

    @pytest.mark.parametrize(
        'norm_cfg',
        [dict(type='GN', num_groups=2), dict(type='BN', track_running_stats=False)],
    )
    def test_what_cannot_be_fused_trains_by_branches(self, name, norm_cfg):
        block = randomise(BLOCKS[name](norm_cfg=norm_cfg).double())
        x = image(2, 4, 8, 8)
        for mode in (True, False):
            outcome = step(block.train(mode), x)
            trained = dict(block.named_parameters()).keys()
            assert outcome['gradients'].keys() == trained | {'input'}
        with branch_by_branch(block):
            assert_same(block(x), outcome['outputs']['output'])


def test_a_first_kernel_of_one_tap_leaves_the_layout():
    """It is contiguous in every memory format."""

    class PointFirst(ReparamBlock):
        def build_branches(self):
            return {
                'point': self.build_conv_norm(**self.aligned_conv(1)),
                'square': self.build_conv_norm(self.build_conv(3)),
            }

    block = PointFirst(4, 4, 3)
    block.switch_to_deploy()
    assert block.main_conv.weight.is_contiguous()


@every_block
@pytest.mark.parametrize('conv_type', ['ConvWS', 'ConvAWS', 'DCN', 'DCNv2'])
def test_convs_whose_kernel_is_not_their_weight(name, conv_type):
    """Such a block can be trained, not fused, and not be built in deploy form."""
    cfg = dict(conv_cfg=dict(type=conv_type))
    if 'depthwise' in name:
        pytest.skip('a kernel of one weight has no deviation, and DCN is not depthwise')
    block = BLOCKS[name](stride=2, **cfg)
    outcome = step(block, image(2, 4, 8, 8, dtype=torch.float32))
    assert outcome['outputs']['output'].shape[2:] == (4, 4)
    assert outcome['gradients'].keys() == dict(block.named_parameters()).keys() | {'input'}
    with pytest.raises(
        NotFoldableError, match=r'has a forward of its own|is not known as a linear layer'
    ):
        block.switch_to_deploy()
    assert not block.deploy
    with pytest.raises(NotFoldableError, match=r'^deploy=True is impossible: '):
        BLOCKS[name](deploy=True, **cfg)


@every_block
@pytest.mark.parametrize('mode', ['train', 'eval'])
def test_pruned_kernels(name, mode):
    """A hook sets them before a conv computes, which it may leave to others."""
    block = BLOCKS[name]().double()
    for module in list(block.modules()):
        if isinstance(module, nn.Conv2d | IdentityConv1x1):
            nn.init.normal_(module.weight)
            prune.random_unstructured(module, 'weight', 0.5)
    randomise(block).train(mode == 'train')
    x = image(2, 4, 8, 9)
    block(x).sum().backward()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    state = block.state_dict()
    for key in [key for key in state if key.endswith('weight_orig')]:
        plain = key.removesuffix('_orig')
        state[plain] = state.pop(key) * state.pop(f'{plain}_mask')
    plain = BLOCKS[name]().double().train(mode == 'train')
    plain.load_state_dict(state)
    if mode == 'train':
        assert_same(plain(x), block(x))
    block.eval()
    with branch_by_branch(plain.eval()):
        expected = plain(x)
    assert_same(expected, block(x))
    with always_one_conv(block):
        assert_same(expected, block(x))
    block.switch_to_deploy()
    assert_same(expected, block(x))


class TestAdaptivePadding:
    """TensorFlow's 'SAME': where the taps lie depends on the size of the input."""

    @pytest.mark.parametrize('name', [n for n in BLOCKS if n != 'conv and norm'])
    @pytest.mark.parametrize('size', [(8, 8), (7, 7), (8, 7), (7, 8)], ids=str)
    @pytest.mark.parametrize('stride', [1, 2, 3])
    def test_deploy_form(self, name, size, stride):
        block = BLOCKS[name](stride=stride, conv_cfg=SAME).double()
        x = image(2, 4, *size)
        assert_one_conv_exact(block, x)
        assert_deploy_equivalent(block, x)

    @pytest.mark.parametrize('kernel_size', [1, 3, 5, 7])
    @pytest.mark.parametrize('stride', [1, 2])
    def test_kernels(self, kernel_size, stride):
        for size in (9, 10):
            block = DiverseBranchBlock(4, 6, kernel_size, stride=stride, conv_cfg=SAME)
            assert_deploy_equivalent(block.double(), image(2, 4, size, size))

    @every_block
    def test_other_parity_is_an_error_once_fused(self, name):
        block = build(name, 'eval', stride=2, conv_cfg=SAME)
        expected = block(image(1, 4, 8, 8))
        deployed = copy.deepcopy(block)
        deployed.switch_to_deploy()
        built = BLOCKS[name](stride=2, conv_cfg=SAME, deploy=True).double()
        built.load_state_dict(deployed.state_dict())
        for form in (deployed, built, copy.deepcopy(deployed)):
            assert_same(expected, form(image(1, 4, 8, 8)))
            assert form(image(1, 4, 6, 10)).shape == (1, 4, 3, 5)
            with pytest.raises(
                ValueError, match=r'fused for inputs for .*\(7, 8\) it is at'
            ):
                form(image(1, 4, 7, 8))
        assert_same(block(image(1, 4, 8, 8)), expected)

    @every_block
    def test_every_size_is_right_before_a_kernel_is_fused(self, name):
        """In a deploy form that is trained from its start."""
        block = BLOCKS[name](stride=2, conv_cfg=SAME, deploy=True).double()
        for size in (7, 8):
            assert block(image(2, 4, size, size)).shape == (2, 4, 4, 4)

    @pytest.mark.skipif(old_torch, reason='torch.export is young there')
    @every_block
    def test_the_deploy_form_is_one_graph(self, name):
        """It asks no buffer where its taps lie: that would wait for a GPU."""
        block = build(name, 'eval', stride=2, conv_cfg=SAME)
        x = image(2, 4, 8, 8)
        expected = block(x)
        block.switch_to_deploy()
        torch._dynamo.reset()
        compiled = torch.compile(block, fullgraph=True, backend='eager')
        assert_same(expected, compiled(x))
        assert_same(expected, torch.export.export(block, (x,)).module()(x))

    @pytest.mark.parametrize('padding', [0, 2])
    @pytest.mark.parametrize('stride', [1, 2])
    def test_padding_has_no_say(self, padding, stride):
        """The conv ignores the argument, and so do the other branches."""
        x = image(2, 4, 8, 7)
        for block in (RepVGGBlock, DiverseBranchBlock):
            options = dict(stride=stride, conv_cfg=SAME)
            moved = block(4, 4, padding=padding, **options).double()
            deployed = assert_deploy_equivalent(moved, x)
            usual = assert_deploy_equivalent(block(4, 4, padding=1, **options).double(), x)
            assert deployed(x).shape == usual(x).shape

    def test_an_odd_kernel_in_an_even_one(self):
        """They are aligned for odd or for even inputs, which a fused conv cannot tell."""
        block = Free(
            4,
            4,
            4,
            padding=1,
            stride=2,
            conv_cfg=SAME,
            one_conv=True,
            make=lambda b: {
                'main': b.build_conv_norm(b.build_conv(4)),
                'odd': b.build_conv_norm(**b.aligned_conv(3)),
            },
        )
        randomise(block.double()).eval()
        for size in (8, 9):
            x = image(1, 4, size, size)
            with branch_by_branch(block):
                expected = block(x)
            assert_same(expected, block(x))
        with pytest.raises(NotFoldableError, match=r'^odd: .*does not fit into'):
            block.switch_to_deploy()

    def test_same_tap_is_no_error(self):
        """With stride 1 every size has the same pad."""
        block = build('repvgg', 'eval', conv_cfg=SAME)
        expected = [block(image(1, 4, size, size)) for size in (7, 8)]
        block.switch_to_deploy()
        assert_same(expected, [block(image(1, 4, size, size)) for size in (7, 8)])

    def test_needs_the_size_once(self):
        block = build('repvgg', 'eval', stride=2, conv_cfg=SAME)
        with pytest.raises(NotFoldableError, match='run one forward pass first'):
            block.switch_to_deploy()
        sizes = [block.equivalent_kernel_bias(size)[0] for size in [(8, 8), (7, 7)]]
        assert_differ(*sizes)
        block(image(1, 4, 8, 8))
        assert torch.equal(block.equivalent_kernel_bias()[0], sizes[0])
        block.switch_to_deploy()


def saved_on_cpu(block: ReparamBlock):
    def function(x):
        with torch.autograd.graph.save_on_cpu():
            return block(x)

    return function


#: What the caller of a block does about memory.
CALLERS = {
    'nobody': lambda block: block,
    'checkpoint': lambda block: lambda x: checkpoint(block, x, use_reentrant=False),
    'saved on cpu': saved_on_cpu,
}


@every_block
class TestCheckpointing:
    """``with_cp``: less memory, and nothing else."""

    @pytest.mark.parametrize('training', [True, False])
    @pytest.mark.parametrize('one_conv', [True, False])
    def test_changes_nothing(self, name, training, one_conv):
        x = image(2, 4, 8, 9)
        plain, saving = (
            build(name, with_cp=cp, one_conv=one_conv).train(training)
            for cp in (False, True)
        )
        for _ in range(2):
            assert_same_step(step(plain, x), step(saving, x))
        assert_same(plain.state_dict(), saving.state_dict())
        saved = running_statistics(saving)
        with torch.no_grad():
            assert_same(plain(x), saving(x))
        if training:
            assert not all(
                map(torch.equal, saved.values(), running_statistics(saving).values())
            )

    def test_a_spectral_norm_iterates_once(self, name):
        plain, saving = (build(name, with_cp=cp) for cp in (False, True))
        for block in (plain, saving):
            torch.manual_seed(0)
            conv = next(m for m in block.modules() if isinstance(m, nn.Conv2d))
            parametrizations.spectral_norm(conv)
            block(image(2, 4, 8, 8)).sum().backward()
        assert_same(plain.state_dict(), saving.state_dict())

    def test_input_needs_no_gradient(self, name):
        block = build(name, with_cp=True)
        block(image(2, 4, 8, 8)).sum().backward()
        assert all(p.grad is not None for p in block.parameters())

    @pytest.mark.parametrize('callers', CALLERS)
    @pytest.mark.parametrize('form', ['train', 'eval'])
    def test_saves_memory(self, name, callers, form):
        """Besides the input and the output no map is left, whatever the caller does."""
        x = image(4, 4, 32, 32).requires_grad_()
        options = dict(form=form, one_conv=False)
        plain, saving = (
            kept_maps(CALLERS[callers](build(name, with_cp=cp, **options)), x)
            for cp in (False, True)
        )
        assert saving <= 0.1
        if callers == 'nobody':
            assert plain >= 1


@every_block
@every_form
class TestLife:
    """What happens to a module in use."""

    @pytest.mark.parametrize(
        'dtype',
        [
            torch.bfloat16,
            pytest.param(
                torch.float16,
                marks=pytest.mark.skipif(old_torch, reason='no half precision on the CPU'),
            ),
        ],
        ids=str,
    )
    def test_half_precision(self, name, form, dtype):
        x = image(4, 4, 16, 16)
        expected = build(name, form)(x)
        block = build(name, form, dtype=torch.float32).to(dtype)
        output = block(x.to(dtype))
        assert output.dtype == dtype
        assert_same(expected, output)

    def test_autocast(self, name, form):
        x = image(4, 4, 16, 16, dtype=torch.float32)
        expected = build(name, form)(x.double())
        block = build(name, form, dtype=torch.float32)
        with torch.autocast('cpu', torch.bfloat16):
            output = block(x)
        assert_same(expected, output, tolerance=0.06)

    def test_channels_last(self, name, form):
        x = image(2, 4, 8, 9)
        expected = build(name, form)(x)
        block = build(name, form).to(memory_format=torch.channels_last)
        output = block(x.to(memory_format=torch.channels_last))
        assert output.is_contiguous(memory_format=torch.channels_last)
        assert_same(expected, output)

    @pytest.mark.parametrize(
        'duplicate',
        [copy.deepcopy, lambda block: pickle.loads(pickle.dumps(block))],
        ids=['deepcopy', 'pickle'],
    )
    def test_copies(self, name, form, duplicate):
        block, x = build(name, form), image(2, 4, 8, 8)
        twin = duplicate(block)
        assert_same(block(x), twin(x))
        randomise(block, seed=5)
        assert_differ(block(x), twin(x))
        if form != 'deploy':
            expected = twin.eval()(x)
            twin.switch_to_deploy()
            assert_same(expected, twin(x))
            assert not block.deploy

    def test_meta_device(self, name, form):
        """A shape and a count of parameters cost nothing."""
        with torch.device('meta'):
            block = BLOCKS[name](deploy=form == 'deploy').train(form == 'train')
            output = block(torch.empty(2, 4, 8, 8))
        assert output.shape == (2, 4, 8, 8)
        assert output.is_meta
        block.switch_to_deploy()
        assert all(p.is_meta for p in block.parameters())


@compiled_block
@every_form
def test_compile(name, form):
    x = image(2, 4, 8, 8)
    torch._dynamo.reset()
    block = build(name, form)
    # The compiler of torch 2.1 does not know zip(strict=True): it breaks the graph.
    whole = not torch.__version__.startswith('2.1.')
    compiled = torch.compile(copy.deepcopy(block), fullgraph=whole, backend='eager')
    assert_same_step(step(block, x), step_of_compiled(compiled, x))


@every_block
@pytest.mark.parametrize('form', ['eval', 'deploy'])
class TestExport:
    """To other programs, in eval mode."""

    def test_trace(self, name, form):
        block = build(name, form)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            traced = torch.jit.trace(block, image(2, 4, 8, 8))
        x = image(2, 4, 8, 8, seed=9)
        assert_same(block(x), traced(x))

    @pytest.mark.skipif(old_torch, reason='torch.export is young there')
    def test_export(self, name, form):
        block = build(name, form)
        exported = torch.export.export(block, (image(2, 4, 8, 8),)).module()
        x = image(2, 4, 8, 8, seed=9)
        assert_same(block(x), exported(x))


def step_of_compiled(compiled: nn.Module, x: torch.Tensor) -> dict:
    """:func:`laws.step`, with the names that the module had before."""
    outcome = step(compiled, x)
    for part in ('gradients', 'statistics'):
        outcome[part] = {k.removeprefix('_orig_mod.'): v for k, v in outcome[part].items()}
    return outcome


class TestSE:
    def test_comes_before_the_act(self):
        """As in RepVGG-D2se."""
        block, x = build('repvgg se', 'eval'), image(2, 4, 6, 6)
        assert_same(block.se_layer(block.linear(x)).relu(), block(x))

    def test_or_after_it(self):
        """As in RepVGGplus."""
        act_cfg = dict(type='LeakyReLU', negative_slope=-0.5)
        block = build('repvgg se', 'eval', se_position='after_act', act_cfg=act_cfg)
        x = image(2, 4, 6, 6)
        linear = block.linear(x)
        expected = block.se_layer(nn.functional.leaky_relu(linear, -0.5))
        assert_same(expected, block(x))
        assert_differ(block.se_layer(linear), block(x))

    @pytest.mark.parametrize(
        ('options', 'error', 'message'),
        [
            (dict(se_cfg=True), TypeError, 'se_cfg must be a dict or None, not True'),
            (
                dict(se_position='first'),
                ValueError,
                "'before_act' or 'after_act', not 'first'",
            ),
        ],
        ids=['se_cfg', 'se_position'],
    )
    def test_refuses(self, options, error, message):
        with pytest.raises(error, match=message):
            RepVGGBlock(4, 4, **options)


@pytest.mark.parametrize(
    'names', list(itertools.permutations(('rows', 'list.0', 'list.1', 'part.shortcut')))
)
def test_a_new_block_costs_its_branches(names):
    """The promise of the design: no fuse code in a new type of block."""

    class Cross(ReparamBlock):
        def build_branches(self):
            rows = self.build_conv((1, 3), padding=(0, 1), bias=True)
            branches = {
                'rows': self.build_conv_norm(rows),
                'list.0': self.build_conv((3, 1), padding=(1, 0), bias=True),
                'list.1': self.build_conv_norm(**self.aligned_conv((3, 1))),
                'part.shortcut': nn.Identity(),
            }
            return {name: branches[name] for name in names}

    block = Cross(4, 4, 3).double()
    assert {'rows.conv.weight', 'list.0.weight'} <= block.state_dict().keys()
    assert len(block.last_norms()) == len(names) - 1
    deployed = assert_deploy_equivalent(block, image(2, 4, 7, 7))
    assert deployed.state_dict().keys() == {
        'branch_reparam.weight',
        'branch_reparam.bias',
    }
    assert_one_conv_exact(Cross(4, 4, 3).double(), image(2, 4, 7, 7))


@every_block
@pytest.mark.parametrize('norm_cfg', [dict(type='BN'), dict(type='GN', num_groups=2)])
def test_last_norms_multiply_all_of_the_output(name, norm_cfg):
    """By which a residual block starts as its shortcut."""
    block = BLOCKS[name](norm_cfg=norm_cfg)
    block.init_weights()
    x = image(2, 4, 8, 9, dtype=torch.float32)
    assert block.linear(x).norm() > 0
    with torch.no_grad():
        for norm in block.last_norms():
            norm.weight.zero_()
    assert block.linear(x).norm() == 0


def layers_of(block: ReparamBlock) -> dict[str, nn.Module]:
    """The layers in the branches and after them that have weights, by name."""
    names = {id(module): name for name, module in block.named_modules()}
    modules = (m for part in block.linear_parts() for m in part.modules())
    return {names[id(m)]: m for m in modules if getattr(m, 'weight', None) is not None}


def modules_of(block: ReparamBlock) -> dict[str, nn.Module]:
    """All that computes in the branches and after them, by name."""
    inside = {id(m) for part in block.linear_parts() for m in part.modules()}
    return {name: m for name, m in block.named_modules() if id(m) in inside}


class Doubled(nn.Module):
    """A layer that was put in another's place, and is another function."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return 2 * self.layer(x)


def double_by_subclass(block: ReparamBlock, name: str) -> None:
    layer = block.get_submodule(name)
    kind = type(layer)
    own = {'forward': lambda self, x: 2 * kind.forward(self, x)}
    layer.__class__ = type('Own', (kind,), own)


def replace_by_double(block: ReparamBlock, name: str) -> None:
    path, _, last = name.rpartition('.')
    setattr(block.get_submodule(path), last, Doubled(block.get_submodule(name)))


def double_by_patch(layer: nn.Module) -> None:
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)


#: Ways in which somebody changes what a layer in a block computes, afterwards.
INTERVENTIONS = {
    'hook': lambda block, name: block.get_submodule(name).register_forward_hook(
        lambda layer, args, output: 2 * output
    ),
    'hook before': lambda block, name: block.get_submodule(name).register_forward_pre_hook(
        lambda layer, args: (2 * args[0],)
    ),
    'replaced': lambda block, name: replace_by_double(block, name),
    'subclass': double_by_subclass,
    'patched': lambda block, name: double_by_patch(block.get_submodule(name)),
}


#: Ways to be told of what a module computes.
HOOKS = (
    'forward_hook',
    'forward_pre_hook',
    'full_backward_hook',
    'full_backward_pre_hook',
)


@every_block
class TestInterventions:
    """What somebody does to a layer inside is never passed over, nor an error."""

    x = image(2, 4, 8, 9)

    @pytest.mark.parametrize('kind', INTERVENTIONS)
    def test_changes_what_is_computed(self, name, kind):
        plain = build(name, 'eval', one_conv=True)
        for layer in layers_of(plain):
            block, twin = copy.deepcopy(plain), copy.deepcopy(plain)
            twin.one_conv = False
            for each in (block, twin):
                INTERVENTIONS[kind](each, layer)
            assert_same(twin(self.x), block(self.x))
            assert_differ(plain(self.x), block(self.x))
            before = block.state_dict().keys()
            with pytest.raises(NotFoldableError):
                block.switch_to_deploy()
            assert block.state_dict().keys() == before

    def test_every_module_with_a_forward_of_its_own(self, name):
        """Containers and layers without weights, too."""
        plain = build(name, 'eval', one_conv=True)
        for part in modules_of(plain):
            block = copy.deepcopy(plain)
            double_by_subclass(block, part)
            with branch_by_branch(block):
                expected = block(self.x)
            assert_differ(plain(self.x), expected)
            assert_same(expected, block(self.x))
            with pytest.raises(NotFoldableError, match='Own has a forward of its own'):
                block.switch_to_deploy()

    @pytest.mark.parametrize('one_conv', [True, False])
    def test_every_hook_fires(self, name, one_conv):
        block = build(name, 'eval', one_conv=one_conv, act_cfg=None)
        fired = []
        for key, layer in modules_of(block).items():
            layer.register_forward_hook(lambda *_, k=key: fired.append(f'forward {k}'))
            layer.register_full_backward_hook(
                lambda *_, k=key: fired.append(f'backward {k}')
            )
        block(self.x.clone().requires_grad_()).sum().backward()
        ways = ('forward', 'backward')
        assert sorted(fired) == sorted(f'{w} {k}' for w in ways for k in modules_of(block))

    @pytest.mark.parametrize('way', HOOKS)
    def test_a_hook_alone_fires(self, name, way):
        """On any one module, be it a container, where nothing else forbids one conv."""
        plain = build(name, 'eval', one_conv=True, act_cfg=None)
        for part in modules_of(plain):
            block, fired = copy.deepcopy(plain), []
            register = getattr(block.get_submodule(part), f'register_{way}')
            register(lambda *_, fired=fired: fired.append(1))
            block(self.x.clone().requires_grad_()).sum().backward()
            assert fired == [1], part

    @pytest.mark.parametrize('way', HOOKS)
    def test_a_hook_on_all_modules_fires(self, name, way):
        block, seen = build(name, 'eval', one_conv=True), []
        register = f'register_module_{way}'
        with getattr(nn.modules.module, register)(lambda module, *_: seen.append(module)):
            block.linear(self.x.clone().requires_grad_()).sum().backward()
        assert {id(module) for module in modules_of(block).values()} <= set(map(id, seen))

    def test_statistics_that_are_lost(self, name):
        """As test-time adaptation sets them to None, to use those of the batch."""
        block = build(name, 'eval', one_conv=True)
        for layer in layers_of(block).values():
            if hasattr(layer, 'running_mean'):
                layer.running_mean = layer.running_var = None
        with branch_by_branch(block):
            expected = block(self.x)
        assert_same(expected, block(self.x))
        with pytest.raises(NotFoldableError, match='without running statistics'):
            block.switch_to_deploy()

    def test_a_weight_that_changes_before_the_backward_pass(self, name):
        """torch says so, where a gradient would be wrong."""
        expected, block = step(build(name), self.x)['gradients'], build(name)
        raised = 0
        for layer in layers_of(block).values():
            x = self.x.clone().requires_grad_()
            output = randomise(block)(x)
            with torch.no_grad():
                layer.weight.mul_(2)
            try:
                (output * image(*output.shape, seed=2)).sum().backward()
            except RuntimeError as error:
                assert 'modified by an inplace operation' in str(error)
                raised += 1
            else:
                assert_same(expected['input'], x.grad)
        assert raised

    def test_a_spectral_norm_iterates_with_norm_eval(self, name):
        block = build(name, one_conv=True)
        for module in block.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        conv = next(m for m in block.modules() if isinstance(m, nn.Conv2d))
        parametrizations.spectral_norm(conv)
        vector = conv.parametrizations.weight[0]._u
        before = vector.clone()
        block(self.x)
        assert not torch.equal(before, vector)


@every_block
@pytest.mark.parametrize('one_conv', [True, False])
class TestTransforms:
    """Of torch.func, and wrappers of training."""

    x = image(2, 4, 8, 9)

    def test_func(self, name, one_conv):
        block = build(name, 'eval', one_conv=one_conv)
        other = randomise(copy.deepcopy(block), seed=6)
        weights = dict(other.named_parameters())
        buffers = dict(other.named_buffers())

        def call(weights, x):
            return torch.func.functional_call(block, (weights, buffers), (x,))

        assert_same(other(self.x), call(weights, self.x))
        tangent = image(2, 4, 8, 9, seed=8)
        _, derivative = torch.func.jvp(lambda x: call(weights, x), (self.x,), (tangent,))
        _, expected = torch.autograd.functional.jvp(other, self.x, tangent)
        assert_same(expected, derivative)
        batch = torch.stack([self.x, tangent])
        assert_same(torch.stack([*map(other, batch)]), torch.func.vmap(other)(batch))
        stacked = {key: torch.stack([w, w + 1]) for key, w in weights.items()}
        ensemble = torch.func.vmap(call, in_dims=(0, None))(stacked, self.x)
        assert_same(other(self.x), ensemble[0])
        for key, weight in weights.items():
            one = torch.func.vmap(lambda w, key=key: call({**weights, key: w}, self.x))
            assert_same(other(self.x), one(torch.stack([weight, weight + 1]))[0])
        gradients = torch.func.grad(lambda w: call(w, self.x).square().sum())(weights)
        loss = other(self.x).square().sum()
        assert_same(torch.autograd.grad(loss, [*weights.values()]), [*gradients.values()])

    @pytest.mark.parametrize('training', [True, False])
    @pytest.mark.parametrize('with_cp', [True, False])
    def test_distributed(self, process_group, name, one_conv, training, with_cp):
        plain, block = (
            build(name, one_conv=one_conv, with_cp=cp).train(training)
            for cp in (False, with_cp)
        )
        wrapped = step(DistributedDataParallel(block), self.x)
        for part in ('gradients', 'statistics'):
            wrapped[part] = {k.removeprefix('module.'): v for k, v in wrapped[part].items()}
        assert_same_step(step(plain, self.x), wrapped)

    def test_backward_on_the_meta_device(self, name, one_conv):
        block = build(name, one_conv=one_conv).to('meta')
        for training in (True, False):
            x = self.x.to('meta').requires_grad_()
            block.train(training)(x).sum().backward()
            assert x.grad.shape == x.shape


@compiled_block
@pytest.mark.parametrize('one_conv', [True, False])
@pytest.mark.skipif(old_torch, reason='the compiler of torch 2.1 breaks the graph')
@pytest.mark.parametrize(
    ('training', 'with_cp'),
    [
        (True, True),
        pytest.param(True, False, marks=pytest.mark.long),
        pytest.param(False, True, marks=pytest.mark.long),
        pytest.param(False, False, marks=pytest.mark.long),
    ],
)
def test_compiled_step(name, one_conv, training, with_cp):
    torch._dynamo.reset()
    x = image(2, 4, 8, 9)
    block = build(name, one_conv=one_conv, with_cp=with_cp).train(training)
    compiled = torch.compile(copy.deepcopy(block), fullgraph=True, backend='aot_eager')
    assert_same_step(step(block, x), step_of_compiled(compiled, x))


@every_block
class TestFromConv:
    """A block in the place of a conv and its norm, at the same function."""

    def make(self, name: str, **options) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
        block = BLOCKS[name]()
        geometry = dict(padding=block.padding, groups=block.groups, bias=False)
        conv = nn.Conv2d(4, 4, block.kernel_size, **{**geometry, **options})
        norm = nn.BatchNorm2d(4, eps=0.01, momentum=0.3)
        randomise(nn.Sequential(conv, norm).double())
        return conv, norm

    def of(self, name: str, *args, **options) -> ReparamBlock:
        own = {'large kernel': SMALL, 'branches': BRANCHES}.get(name, {})
        return type(BLOCKS[name]()).from_conv(*args, **own, **options)

    @pytest.mark.parametrize(
        'options',
        [
            {},
            dict(stride=2),
            dict(bias=True),
            dict(padding_mode='reflect'),
            dict(padding='same'),
            dict(dilation=2, stride=(1, 2)),
        ],
        ids=str,
    )
    def test_is_the_same_function(self, name, options):
        conv, norm = self.make(name, **options)
        unit = nn.Sequential(conv, norm).eval()
        block = self.of(name, conv, norm, one_conv=False).eval()
        x = image(2, 4, 11, 12)
        assert_same(unit(x), block(x), tolerance=1e-6)
        assert_same(copy.deepcopy(unit).train()(x), block.train()(x), tolerance=1e-6)
        own = {id(parameter) for parameter in block.parameters()}
        # What cannot start at zero is taken out of a copy of the conv.
        kept = unit if block.fixed_kernel() is None else norm
        assert {id(parameter) for parameter in kept.parameters()} <= own
        if block.post_norm is None:
            assert norm.running_mean is block.last_norms()[0].running_mean
        others = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
        assert {(m.eps, m.momentum) for m in others} == {(0.01, 0.3)}

    def test_every_branch_learns_and_the_block_can_be_fused(self, name):
        conv, norm = self.make(name, stride=2)
        block = self.of(name, conv, norm)
        x = image(2, 4, 11, 12)
        optimizer = torch.optim.SGD(block.parameters(), 0.1)
        for _ in range(2):
            gradients = step(block, x)['gradients']
            optimizer.step()
        for branch in block.branches():
            assert any(g.norm() > 0 for k, g in gradients.items() if k.startswith(branch))
        expected = block.eval()(x)
        block.switch_to_deploy()
        assert_same(expected, block(x))

    @pytest.mark.parametrize('training', [True, False])
    def test_keeps_dtype_device_mode_and_what_is_frozen(self, name, training):
        conv, norm = self.make(name, stride=2)
        conv.requires_grad_(False)
        conv.to('meta', torch.bfloat16).train(training)
        norm.to('meta', torch.bfloat16).train(not training)
        block = self.of(name, conv, norm)
        assert {p.dtype for p in block.parameters()} == {torch.bfloat16}
        assert all(tensor.is_meta for tensor in block.state_dict().values())
        assert not conv.weight.requires_grad
        assert norm.training is not training
        others = {m.training for m in block.modules() if m is not norm}
        assert others == {training}

    def test_without_a_norm(self, name):
        conv, _ = self.make(name, bias=True, stride=2)
        x = image(2, 4, 11, 12)
        assert_same(conv(x), self.of(name, conv)(x), tolerance=1e-6)


class Free(ReparamBlock):
    """A block of whatever branches it is given."""

    def __init__(self, *args, make, **options):
        self.make = make
        super().__init__(*args, **options)

    def build_branches(self):
        return self.make(self)


def main_and(**others):
    """The kxk conv with its norm, and other branches."""
    return lambda block: {
        'main': block.build_conv_norm(block.build_conv(3)),
        **{name: make(block) for name, make in others.items()},
    }


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda b: {'main': b.build_conv(3)}, 'main of Free is not a Sequential of a'),
        (
            lambda b: {'main': ConvModule(4, 4, 3, padding=1, act_cfg=None)},
            'main of Free is not a Sequential of a conv and',
        ),
        (lambda b: {'main': nn.Sequential(OrderedDict(conv=b.build_conv(3)))}, 'no norm'),
        (
            main_and(other=lambda b: IdentityConv1x1(4)),
            'last layer of other of Free has no scale or kernel that could start at 0',
        ),
    ],
    ids=['conv', 'ConvModule', 'no norm', 'identity conv'],
)
def test_from_conv_refuses_branches_that_it_does_not_know(make, message):
    with pytest.raises(ValueError, match=message):
        Free.from_conv(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), make=make)


@pytest.mark.parametrize('name', ['act', 'se_layer', 'branch_reparam', 'stride', 'act.0'])
def test_names_that_a_block_has_itself(name):
    make = main_and(**{name: lambda b: b.build_norm(4)})
    with pytest.raises(ValueError, match='a branch cannot be named'):
        Free(4, 4, 3, make=make)


def test_a_block_of_mixed_precision():
    """Norms in float32 and convs in half, a norm first."""
    block = Free(
        4,
        4,
        3,
        one_conv=True,
        make=lambda b: {
            'norm': b.build_norm(4),
            'main': b.build_conv_norm(b.build_conv(3)),
        },
    )
    x = image(2, 4, 8, 8)
    expected = randomise(block.double()).eval()(x)
    for module in block.bfloat16().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    output = block(x.bfloat16())
    assert output.dtype == torch.bfloat16
    assert_same(expected, output)
    block.switch_to_deploy()
    assert {p.dtype for p in block.parameters()} == {torch.bfloat16}
    assert_same(expected, block(x.bfloat16()))


def test_a_block_without_parameters():
    block = Free(4, 4, 3, one_conv=True, make=lambda b: {'same': nn.Identity()})
    x = image(2, 4, 8, 8)
    assert_same(x.relu(), block.eval()(x.clone()))
    with pytest.raises(NotFoldableError, match='no branch has a parameter'):
        block.switch_to_deploy()


def test_from_conv_with_a_last_conv_of_a_bias():
    """It starts at zero, too."""

    class Biased(ReparamBlock):
        def build_branches(self):
            return {
                'main': self.build_conv_norm(self.build_conv(3)),
                'other': self.build_conv(3, bias=True),
            }

    conv = randomise(nn.Conv2d(4, 4, 3, padding=1).double())
    block, x = Biased.from_conv(conv), image(1, 4, 5, 5)
    assert_same(conv(x), block(x))


def test_from_conv_of_other_types():
    conv = Conv2dAdaptivePadding(4, 6, 3, stride=2).double()
    norm = nn.SyncBatchNorm(6)
    block = DiverseBranchBlock.from_conv(conv, norm.double()).eval()
    x = image(1, 4, 8, 8)
    with branch_by_branch(block):
        assert_same(norm(conv(x)), block(x))
    assert type(block.branch_1x1.conv) is Conv2dAdaptivePadding
    assert type(block.branch_1x1.norm) is nn.SyncBatchNorm
    with pytest.raises(NotFoldableError, match='ConvWS2d has a forward of its own'):
        DiverseBranchBlock.from_conv(ConvWS2d(4, 4, 3))


@pytest.mark.parametrize('name', ['repvgg', 'dbb'])
def test_two_blocks_in_a_row(name):
    """In-place operations of one block leave the other's gradients right."""
    chain = nn.Sequential(build(name, act_cfg=dict(type='ReLU')), build(name))
    twin = copy.deepcopy(chain)
    for block in twin:
        if block.act is not None:
            block.act = nn.ReLU(inplace=False)
    x = image(2, 4, 7, 7)
    assert_same_step(step(twin, x), step(chain, x))
    report = switch_to_deploy(chain.eval())
    assert report.switched == ['0', '1']
    assert math.isclose(report.params_after, 2 * (4 * 4 * 9 + 4))
