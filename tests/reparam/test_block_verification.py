import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from laws import Calls, assert_differ, assert_same, image, randomise
from mmcv.cnn import build_conv_layer
from mmengine.config import Config
from torch import Tensor, nn
from torch.nn.utils import prune

from mmrep.deployment import build_model, enter_scope
from mmrep.expansion import collapse
from mmrep.models.backbones import DBBResNet, RepVGG
from mmrep.models.blocks import ConvNormBlock, DiverseBranchBlock, RepVGGBlock
from mmrep.reparam import (
    BlockDifference,
    BlockReference,
    Call,
    block_references,
    block_verification,
    branch_by_branch,
    compare_block,
    compare_blocks,
    seen_inputs,
    switch_to_deploy,
    verifiable_blocks,
)

CONFIGS = Path(__file__).parents[2] / 'configs'
RTOL = 1e-4


def demo(name: str) -> nn.Module:
    """A network of the demo, with random weights and statistics."""
    config = Config.fromfile(CONFIGS / f'{name}.py')
    enter_scope(config)
    return randomise(build_model(config))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    'demo RepVGG': lambda: demo('repvgg/repvgg-tiny_1xb64_digits'),
    'demo DBB-ResNet-18': lambda: demo('dbb/dbb-resnet18-tiny_1xb64_digits'),
    'demo FCN': lambda: demo('repvgg/repvgg-tiny_fcn_1xb16-1k_digits-64x64'),
    'fresh RepVGG-A0': lambda: RepVGG('A0'),
    'DBB-ResNet-18': lambda: randomise(DBBResNet(18)),
    'deep stem': lambda: randomise(DBBResNet(18, deep_stem=True, base_channels=8)),
}


def observe(model: nn.Module, *shape: int) -> dict[str, BlockReference]:
    model.eval()
    dtype = next(model.parameters()).dtype
    with torch.no_grad(), branch_by_branch(model):
        with seen_inputs(model) as seen:
            model(image(*shape, dtype=dtype))
        return block_references(model, seen)


@torch.no_grad()
def scale(conv: nn.Module) -> None:
    conv.weight *= 1.01


@torch.no_grad()
def zero_a_tap(conv: nn.Module) -> None:
    index = tuple(torch.randint(size, ()) for size in conv.weight.shape)
    assert conv.weight[index] != 0
    conv.weight[index] = 0


@torch.no_grad()
def swap_channels(conv: nn.Module) -> None:
    first, second = torch.randperm(len(conv.weight))[:2].tolist()
    order = list(range(len(conv.weight)))
    order[first], order[second] = second, first
    conv.weight.copy_(conv.weight[order])
    conv.bias.copy_(conv.bias[order])


@torch.no_grad()
def shift_the_bias(conv: nn.Module) -> None:
    # That of a fresh network is zero: then by 1 % of what the kernel makes of noise.
    response = conv.weight.flatten(1).norm(dim=1)
    conv.bias += 0.01 * torch.where(conv.bias == 0, response, conv.bias)


FAULTS = (scale, zero_a_tap, swap_channels, shift_the_bias)


@contextmanager
def fault_in(conv: nn.Module, fault: Callable) -> Iterator[None]:
    """A conv with a fault in it."""
    before = [p.detach().clone() for p in conv.parameters()]
    fault(conv)
    yield
    with torch.no_grad():
        for parameter, value in zip(conv.parameters(), before, strict=True):
            parameter.copy_(value)


class TestJudgement:
    """What counts as right: all of it, each by its own measure."""

    RIGHT = BlockDifference(1e-6, 1e-6, 5e-5, 1e-7)

    @pytest.mark.parametrize(
        ('changes', 'right'),
        [
            ({}, True),
            (dict(kernel=2e-5), False),
            (dict(bias=2e-5), False),
            (dict(seen=2e-4), False),
            (dict(seen=2e-4, branches_seen=1.1e-4), True),
            (dict(seen=2e-4, branches_seen=1e-4), True),
            (dict(seen=2e-4, branches_seen=0.9e-4), False),
            (dict(seen=2e-4, branches_seen=0.0), False),
            (dict(seen=RTOL), True),
            (dict(kernel=RTOL / 10, bias=RTOL / 10), True),
            (dict(kernel=0.95 * RTOL / 10), True),
            (dict(kernel=1.05 * RTOL / 10), False),
            (dict(seen=None, branches_seen=None), True),
            (dict(kernel=float('inf')), False),
        ],
    )
    def test_is_within(self, changes, right):
        fields = vars(self.RIGHT) | changes
        assert BlockDifference(**fields).is_within(RTOL) is right

    def test_worst(self):
        assert BlockDifference(1e-7, 3e-7, 1.0).worst == 3e-7
        assert BlockDifference(4e-7, 3e-7, 1.0).worst == 4e-7

    @pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
    def test_a_tolerance_below_rounding(self, dtype):
        """Eight times that of a number of the dtype is allowed."""
        eps = torch.finfo(dtype).eps
        for number, right in ((8, True), (8.5, False)):
            wrong = dict(kernel=number * eps), dict(bias=number * eps)
            for fields in (*wrong, dict(seen=number * eps)):
                difference = BlockDifference(**dict(kernel=0.0, bias=0.0) | fields)
                assert difference.is_within(0.0, dtype) is right
        assert not BlockDifference(2e-7, 2e-7).is_within(1e-9, torch.float64)
        assert BlockDifference(2e-7, 2e-7).is_within(1e-9)

    def test_equal_ones_are_one(self):
        assert len({BlockDifference(1.0, 2.0), BlockDifference(1.0, 2.0)}) == 1


class Unit(nn.Module):
    """A conv outside the blocks, which is verified as they are."""

    def __init__(self, *args, **options) -> None:
        super().__init__()
        self.conv = nn.Conv2d(*args, **options)

    def plain_units(self) -> dict:
        return dict(conv=[self.conv])


def change(unit: Unit, fault: Callable[[nn.Module], None], *seen: Tensor):
    """What is said of a conv that is changed after the references were taken."""
    references = block_references(unit, {'conv': Call(seen, {})} if seen else {})
    with torch.no_grad():
        fault(unit.conv)
    return references['conv'], compare_blocks(references, unit)['conv']


class TestErrors:
    """Relative L2 errors, against pencil and paper."""

    def test_of_one_channel_of_the_kernel(self):
        unit, x = randomise(Unit(4, 6, 3)).double(), image(2, 4, 5, 7)
        expected = unit.conv(x)

        def scale_one(conv):
            conv.weight[2] *= 1.01

        _, difference = change(unit, scale_one, x)
        assert difference.kernel == pytest.approx(0.01, rel=1e-6)
        assert difference.bias == 0
        error = ((unit.conv(x) - expected).norm() / expected.norm()).item()
        assert difference.seen == pytest.approx(error, rel=1e-6)
        assert difference.branches_seen == 0

    def test_of_one_channel_of_the_bias(self):
        def scale_one(conv):
            conv.bias[3] *= 1.01

        _, difference = change(randomise(Unit(4, 6, 3)).double(), scale_one)
        assert difference.bias == pytest.approx(0.01, rel=1e-6)
        assert difference.kernel < 1e-12
        assert difference.seen is difference.branches_seen is None
        assert difference.note == '' == BlockDifference(0, 0).note

    @pytest.mark.parametrize(('part', 'error'), [(1e-5, 1e-2), (1e-9, 1e-5)])
    def test_of_a_channel_that_is_next_to_nothing(self, part, error):
        """Below a millionth of the mean one it is measured against that."""
        unit = randomise(Unit(4, 4, 3)).double()
        with torch.no_grad():
            unit.conv.weight.copy_(unit.conv.weight[0].expand(4, -1, -1, -1))
            unit.conv.weight[0] *= part

        def scale_it(conv):
            conv.weight[0] *= 1.01

        _, difference = change(unit, scale_it)
        if part < 1e-6:
            error /= 0.75**0.5
        assert difference.kernel == pytest.approx(error, rel=1e-5)

    def test_of_a_bias_that_was_zero(self):
        """It is measured against the kernel's response, and so is the output."""
        unit = randomise(Unit(4, 4, 3)).double()
        nn.init.zeros_(unit.conv.bias)

        def shift(conv):
            conv.bias += 1e-3

        x = torch.zeros(1, 4, 6, 6, dtype=torch.float64)
        reference, difference = change(unit, shift, x)
        varying = reference.responses.seeded - reference.responses.zeros
        error = 1e-3 / (1e-6 * varying.square().mean().sqrt().item())
        assert difference.bias == pytest.approx(error, rel=1e-6)
        assert difference.seen == pytest.approx(error, rel=1e-6)

    def test_of_nothing(self):
        unit = Unit(4, 4, 3)
        for parameter in unit.parameters():
            nn.init.zeros_(parameter)
        _, difference = change(unit, lambda conv: None, image(1, 4, 6, 6).float())
        assert difference == BlockDifference(0.0, 0.0, 0.0, 0.0)
        _, difference = change(unit, lambda conv: conv.weight.add_(1))
        assert difference.kernel == float('inf')

    def test_of_what_is_no_number(self):
        _, difference = change(Unit(4, 4, 3), lambda conv: conv.weight.fill_(float('nan')))
        assert difference.kernel == float('inf')

    def test_in_the_dtype_of_the_branches(self):
        """Their rounding is not the fused block's."""
        unit, x = randomise(Unit(4, 6, 3)).bfloat16(), image(1, 4, 5, 5).bfloat16()
        exact = copy.deepcopy(unit.conv).double()(x.double())
        rounding = ((unit.conv(x) - exact).norm() / exact.norm()).item()
        assert rounding > 1e-4
        _, difference = change(unit, lambda conv: conv.weight.mul_(2), x)
        assert difference.branches_seen == pytest.approx(rounding, rel=1e-6)
        assert difference.seen > 0.1


class TestInputs:
    """What blocks are called with."""

    @pytest.mark.parametrize(
        ('options', 'size'),
        [
            (dict(kernel_size=3), (8, 8)),
            (dict(kernel_size=5, stride=3), (9, 9)),
            (dict(kernel_size=(3, 2), dilation=(3, 12), stride=(2, 5)), (11, 18)),
            (dict(kernel_size=3, stride=8), (11, 11)),
            (dict(kernel_size=1, padding=20), (21, 21)),
        ],
    )
    def test_every_tap_of_a_kernel_is_met(self, options, size):
        unit = Unit(4, 6, **options)
        reference = block_references(unit, {})['conv']
        for call in reference.inputs[:2]:
            assert call.args[0].shape == (1, 4, *size)
        assert not reference.inputs.zeros.args[0].any()

    def test_that_are_drawn(self):
        def drawn(**seed):
            return block_references(Unit(4, 4, 3), {}, **seed)['conv'].inputs.seeded.args[0]

        generator = torch.Generator().manual_seed(0)
        assert torch.equal(drawn(), torch.randn(1, 4, 8, 8, generator=generator))
        assert torch.equal(drawn(), drawn(seed=0))
        assert not torch.equal(drawn(), drawn(seed=1))

    def test_where_the_block_is(self):
        """By its parameters or, if it has none, by its buffers."""
        call = Call((torch.empty(1, 4, 5, 5),), {})
        for block in (Unit(4, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU()):
            inputs = block_verification._inputs(block.to('meta'), call, None, 0)
            assert inputs.seeded.args[0].is_meta is not isinstance(block, nn.ReLU)

    def test_the_first_of_several(self):
        unit = Unit(4, 4, 3)
        with seen_inputs(unit) as seen:
            for number in range(2):
                unit.conv(torch.full((1, 4, 5, 5), float(number)))
        assert not seen['conv'].args[0].any()

    def test_nobody_looks_when_a_forward_pass_has_failed(self):
        unit = Unit(4, 4, 3)
        with pytest.raises(RuntimeError), seen_inputs(unit):
            unit.conv(torch.zeros(1))
        assert not unit.conv._forward_pre_hooks

    def test_in_one_pass_without_a_graph(self):
        """The seeded input and zeros."""
        graphs = []

        class Graphs(Calls):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                if func is torch.conv2d:
                    graphs.append(torch.is_grad_enabled())
                return super().__torch_function__(func, types, args, kwargs)

        unit = Unit(4, 4, 3)
        with Graphs():
            compare_blocks(block_references(unit, {}), unit)
        assert graphs == [False, False]

    def test_that_are_not_finite(self):
        x = torch.full((1, 4, 5, 5), float('inf'))
        with pytest.raises(ValueError, match=r'^conv: its output is not finite'):
            block_references(Unit(4, 4, 3), {'conv': Call((x,), {})})


class Foreign(nn.Module):
    """A block of another package: of several tensors, and it writes into its input."""

    def __init__(self, wrong: float = 0.0) -> None:
        super().__init__()
        self.wrong = wrong
        self.branches = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)])
        self.register_buffer('order', torch.tensor([2, 0, 3, 1]))

    def forward(self, x: Tensor, index: Tensor, name: str, y: Tensor) -> dict:
        x.mul_(0.5)
        out = sum(branch(x) - branch(y) for branch in self.branches).relu()
        # Integers are not compared.
        number = torch.tensor([len(self.branches)])
        return dict(first=[out[:, self.order], number], name=name, rest=y[:, index])

    @torch.no_grad()
    def switch_to_deploy(self) -> None:
        first, second = self.branches
        first.weight += (1 + self.wrong) * second.weight
        first.bias += second.bias
        self.branches = nn.ModuleList([first])


class Owner(nn.Module):
    """Calls a block, with what a user of it gives."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor):
        return self.block(x.clone(), torch.tensor([1, 0]), 'name', y=x.flip(1))


class TestForeignBlocks:
    @pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
    @pytest.mark.parametrize(('wrong', 'right'), [(0.0, True), (0.01, False)])
    def test_held_to_the_same(self, wrong, right, dtype):
        model = randomise(Owner(Foreign(wrong))).to(dtype)
        references = observe(model, 2, 4, 6, 6)
        switch_to_deploy(model)
        (difference,) = compare_blocks(references, model).values()
        assert difference.is_within(RTOL) is right
        assert difference.worst < 1e-6 or not right
        assert difference.branches_seen < 1e-6

    def test_a_unit_that_is_no_known_conv(self):
        class Unknown(nn.Sequential):
            def plain_units(self):
                return {'0': [*self]}

        model = randomise(Unknown(nn.ConvTranspose2d(4, 6, 3)))
        references = observe(model, 1, 4, 5, 5)
        seeded, _, seen = (call.args[0] for call in references['0'].inputs)
        assert seeded.shape == seen.shape
        assert_differ(seen, seeded)
        with torch.no_grad():
            model[0].weight *= 1.01
            model[0].bias *= 1.02
        difference = compare_blocks(references, model)['0']
        assert difference.kernel == pytest.approx(0.01, rel=1e-3)
        assert difference.bias == pytest.approx(0.02, rel=1e-3)

    def test_one_that_is_a_conv(self):
        """Its switch may do anything, and so it is no conv of ours."""

        class Conv(nn.Conv2d):
            def switch_to_deploy(self) -> None:
                self.weight.data *= 1.01

        model = randomise(nn.Sequential(Conv(4, 4, 3)))
        references = observe(model, 1, 4, 6, 6)
        assert not references['0'].by_channel
        switch_to_deploy(model)
        assert not compare_blocks(references, model)['0'].is_within(RTOL)

    def test_nothing_is_known_of_what_it_takes(self):
        model = Owner(Foreign())
        with pytest.raises(ValueError, match=r'^block: the input does not reach it'):
            block_references(model, {})

    def test_no_tensor(self, monkeypatch):
        model = Owner(Foreign())
        monkeypatch.setattr(Foreign, 'forward', lambda *args, **kwargs: 'text')
        with pytest.raises(ValueError, match='it returns str, which contains no floating'):
            observe(model, 1, 4, 6, 6)


class TestBlocks:
    def test_outer_ones_stand_for_inner_ones(self):
        outer = RepVGGBlock(4, 4)
        outer.branch_1x1.add_module('conv', RepVGGBlock(4, 4, act_cfg=None))
        blocks = verifiable_blocks(nn.Sequential(outer, RepVGGBlock(4, 4)))
        assert blocks.keys() == {'0', '1'}

    def test_a_flag_is_no_method(self):
        module = nn.ReLU()
        module.plain_units = True
        assert verifiable_blocks(module) == {}

    def test_plain_units(self):
        """Convs with a norm outside the blocks, which are fused, too."""
        model = DBBResNet(50, base_channels=4, deep_stem=True)
        names = verifiable_blocks(model).keys()
        assert {'stem.0', 'stem.3', 'layer1.0.conv1', 'layer1.0.conv2'} <= names
        assert {'layer1.0.conv3', 'layer1.0.downsample.0'} <= names
        assert verifiable_blocks(Unit(4, 4, 3)).keys() == {'conv'}
        references = observe(randomise(model), 1, 3, 32, 32)
        switch_to_deploy(model)
        assert compare_blocks(references, model).keys() == names

    def test_one_that_is_gone(self):
        references = observe(nn.Sequential(RepVGGBlock(4, 4)), 1, 4, 6, 6)
        with pytest.raises(ValueError, match='the deploy form has no module named 0'):
            compare_blocks(references, nn.Sequential())

    def test_one_that_became_another_module(self):
        references = observe(nn.Sequential(RepVGGBlock(4, 4)), 1, 4, 6, 6)
        found = compare_blocks(references, nn.Sequential(nn.Identity()))
        assert not found['0'].is_within(RTOL)

    def test_the_first_that_is_gone_is_named(self):
        model = nn.Sequential(*(RepVGGBlock(4, 4) for _ in range(3)))
        references = observe(model, 1, 4, 6, 6)
        with pytest.raises(ValueError, match='the deploy form has no module named 1'):
            compare_blocks(references, model[:1])
        first = {'0': references['0']}
        assert compare_blocks(first, model).keys() == {'0'}

    def test_another_geometry(self):
        references = observe(RepVGGBlock(4, 4), 1, 4, 8, 8)
        other = RepVGGBlock(4, 4, stride=2, deploy=True)
        with pytest.raises(ValueError, match=r'^the block: outputs of shape'):
            compare_blocks(references, other)

    def test_one_that_the_input_does_not_reach(self):
        block = randomise(RepVGGBlock(4, 4)).eval()
        references = block_references(block, {})
        block.switch_to_deploy()
        (difference,) = compare_blocks(references, block).values()
        assert 0 < difference.worst < 1e-6
        assert difference.seen is difference.branches_seen is None
        assert difference.note == '' == BlockDifference(0, 0).note

    def test_same_padding(self):
        """Its kernel is that of inputs with one remainder by the stride."""
        options = dict(stride=3, conv_cfg=dict(type='Conv2dAdaptivePadding'))
        block = randomise(RepVGGBlock(4, 4, **options))
        with pytest.raises(ValueError, match='does not reach'):
            block_references(block, {})
        references = observe(block, 1, 4, 10, 11)
        assert references[''].inputs.seeded.args[0].shape == (1, 4, 10, 8)
        assert block.input_size == (10, 11)
        block.switch_to_deploy()
        (difference,) = compare_blocks(references, block).values()
        assert difference.is_within(RTOL)

    def test_large_dilation_on_a_small_map(self):
        """Every tap is met, though the input that was seen meets the middle one alone."""
        block = randomise(RepVGGBlock(4, 4, dilation=12, padding=12))
        references = observe(block, 1, 4, 5, 5)
        block.switch_to_deploy()
        with torch.no_grad():
            block.branch_reparam.weight[0, 0, 0, 0] = 0
        (difference,) = compare_blocks(references, block).values()
        assert difference.seen < 1e-6 < difference.kernel

    def test_nothing_is_changed(self):
        model = randomise(DBBResNet(18, base_channels=4)).eval()
        before = copy.deepcopy(model.state_dict())
        state = torch.get_rng_state()
        observe(model, 1, 3, 32, 32)
        assert torch.equal(torch.get_rng_state(), state)
        assert_same(before, model.state_dict(), 0)
        assert not any(m._forward_pre_hooks for m in model.modules())
        assert all(p.dtype is torch.float32 for p in model.parameters())

    def test_the_first_that_is_not_finite_is_named(self):
        model = nn.Sequential(*(RepVGGBlock(4, 4) for _ in range(3)))
        with torch.no_grad():
            model[1].branch_3x3.conv.weight[0] = float('nan')
        with pytest.raises(ValueError, match=r'^1: its output is not finite'):
            observe(model, 1, 4, 6, 6)

    def test_first_is_what_was_called_first(self):
        model = nn.Sequential(Unit(4, 4, 1), Unit(4, 4, 1))
        for parameter in model.parameters():
            nn.init.constant_(parameter, float('nan'))
        call = Call((image(1, 4, 5, 5, dtype=torch.float32),), {})
        with pytest.raises(ValueError, match=r'^1\.conv: its output is not finite'):
            block_references(model, {'1.conv': call, '0.conv': call})


class TestLaw:
    @pytest.mark.parametrize('name', NETWORKS)
    def test_every_block_is_right_and_every_fault_is_seen(self, name, tally):
        model = NETWORKS[name]()
        references = observe(model, 1, 3, 32, 32)
        report = switch_to_deploy(model)
        blocks = verifiable_blocks(model)
        assert set(report.switched) <= references.keys()
        for block, reference in references.items():
            right = compare_block(reference, blocks[block])
            assert right.is_within(RTOL) and right.worst < 1e-6, (block, right)
            (conv,) = (m for m in blocks[block].modules() if isinstance(m, nn.Conv2d))
            for fault in FAULTS:
                with fault_in(conv, fault):
                    wrong = compare_block(reference, blocks[block])
                assert not wrong.is_within(RTOL), (block, fault.__name__, wrong)
                tally('wrong blocks')
            assert compare_block(reference, blocks[block]) == right

    @pytest.mark.parametrize('offset', [0, 1e6])
    def test_inputs_that_hide_the_kernel(self, offset):
        """A constant image, and one that is next to nothing beside its mean."""
        block = randomise(RepVGGBlock(8, 8)).eval()
        x = offset + 1e-3 * image(1, 8, 9, 9, dtype=torch.float32)
        with branch_by_branch(block):
            references = block_references(block, {'': Call((x,), {})})
        block.switch_to_deploy()
        assert compare_blocks(references, block)[''].is_within(RTOL)
        for fault in FAULTS:
            with fault_in(block.branch_reparam, fault):
                assert not compare_blocks(references, block)[''].is_within(RTOL)

    @pytest.mark.parametrize(
        ('dtype', 'rtol'), [(torch.float64, 1e-10), (torch.bfloat16, RTOL)]
    )
    def test_other_dtypes(self, dtype, rtol):
        block = randomise(DiverseBranchBlock(8, 8, 3)).to(dtype)
        references = observe(block, 1, 8, 9, 9)
        block.switch_to_deploy()
        (difference,) = compare_blocks(references, block).values()
        assert difference.is_within(rtol, dtype), difference
        with fault_in(block.branch_reparam, swap_channels):
            (difference,) = compare_blocks(references, block).values()
        assert not difference.is_within(rtol, dtype)


class TestNormsAfter:
    """A conv in the place of a block, and the norm that has the block's bias."""

    NORMS = {'conv': 'norm'}

    @staticmethod
    def collapsed(bias: bool) -> tuple[nn.Module, dict[str, BlockReference]]:
        """A block and a norm as a conv and a norm, and what the two were."""
        conv = build_conv_layer(dict(type='mmrep.DBBConv2d'), 3, 4, 3, bias=bias)
        layers = OrderedDict(conv=conv, norm=nn.BatchNorm2d(4))
        model = randomise(nn.Sequential(layers)).eval()
        x = image(1, 3, 9, 8, dtype=torch.float32)
        with torch.no_grad(), branch_by_branch(model):
            with seen_inputs(model) as seen:
                model(x)
            norms = {} if bias else TestNormsAfter.NORMS
            references = block_references(model, seen, norms=norms)
        collapse(model, x)
        return model, references

    def test_a_norm_goes_with_it(self):
        model, references = self.collapsed(bias=False)

        def compare(norms: dict[str, str | None] = self.NORMS) -> BlockDifference:
            return compare_blocks(references, model, norms)['conv']

        assert verifiable_blocks(model) == {}
        unit = verifiable_blocks(model, self.NORMS)['conv']
        assert list(unit) == [model.conv, model.norm]
        assert compare().worst < 1e-6 and compare().seen < 1e-6
        for tensor in (model.conv.weight, model.norm.weight, model.norm.bias):
            kept = tensor.detach().clone()
            with torch.no_grad():
                tensor *= 1.01
                assert not compare().is_within(RTOL)
                tensor.copy_(kept)
        # The block alone had another bias.
        assert not compare({'conv': None}).is_within(RTOL)

    def test_a_conv_has_its_own(self):
        model, references = self.collapsed(bias=True)
        with torch.no_grad():
            model.norm.bias += 1
        norms = {'conv': None}
        assert list(verifiable_blocks(model, norms)['conv']) == [model.conv]
        assert compare_blocks(references, model, norms)['conv'].worst < 1e-6
        scale(model.conv)
        assert not compare_blocks(references, model, norms)['conv'].is_within(RTOL)

    def test_other_blocks_are_what_they_are_without(self):
        model, _ = self.collapsed(bias=False)
        model.add_module('other', ConvNormBlock(4, 4, 3))
        blocks = verifiable_blocks(model, self.NORMS)
        assert blocks.keys() == {'conv', 'other'}
        assert list(blocks['other'].children()) == [model.other]


class Sum(nn.Module):
    """A foreign block of a list of maps, whose switch may be wrong by a factor."""

    def __init__(self, wrong: float = 1.0) -> None:
        super().__init__()
        self.wrong = wrong
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.conv(maps[0] + maps[1])

    @torch.no_grad()
    def switch_to_deploy(self) -> None:
        self.conv.weight *= self.wrong


class Small(Sum):
    """Adds next to nothing to its input."""

    scale = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.conv(x)


class Folded(Small):
    """Has the identity in its kernel in the end, which is as right as float32 is."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if self.wrong is None else super().forward(x)

    @torch.no_grad()
    def switch_to_deploy(self) -> None:
        eye = torch.eye(4).view(4, 4, 1, 1)
        self.conv.weight.copy_(eye + 1e-5 * self.conv.weight)
        self.conv.bias *= 1e-5
        self.wrong = None


class Listing(nn.Module):
    """Gives its block a list."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block([x, x])


class Maps(NamedTuple):
    """Two maps, and what is none."""

    first: Tensor
    second: list[Tensor]
    scale: int = 2


class TestCalls:
    def test_every_real_tensor_is_changed(self):
        classes = torch.ones(1, dtype=torch.int64)
        call = Call((Maps(torch.ones(2), [torch.ones(3), classes]),), {'text': 'a'})
        changed = call.map(lambda tensor: tensor + 1)
        assert type(changed) is Call and changed.kwargs == {'text': 'a'}
        (maps,) = changed.args
        assert type(maps) is Maps and maps.scale == 2
        assert type(maps.second) is list and maps.second[1] is classes
        assert maps.first.tolist() == [2, 2] and maps.second[0].tolist() == [2, 2, 2]
        assert call.args[0].first.tolist() == [1, 1]

    def test_size_is_that_of_the_first_argument(self):
        first, second = torch.ones(1, 2, 3, 4), torch.ones(1, 2, 5, 6)
        assert Call((first, second), {}).size == (3, 4)
        assert Call((first,), {'x': second}).size == (3, 4)
        assert Call((), {'x': second}).size == (5, 6)


class TestHardCases:
    @pytest.mark.parametrize(('wrong', 'right'), [(1.0, True), (1.01, False)])
    @pytest.mark.parametrize(
        'make',
        [lambda wrong: Listing(Sum(wrong)), lambda wrong: nn.Sequential(Small(wrong))],
    )
    def test_foreign_block(self, make, wrong, right):
        model = randomise(make(wrong))
        references = observe(model, 1, 4, 6, 6)
        switch_to_deploy(model)
        (difference,) = compare_blocks(references, model).values()
        assert difference.is_within(RTOL) is right

    def test_error_of_what_is_added(self):
        model = nn.Sequential(randomise(Small(1.01)))
        model[0].scale = 0.1
        references = observe(model, 1, 4, 6, 6)
        switch_to_deploy(model)
        (difference,) = compare_blocks(references, model).values()
        assert difference.kernel == pytest.approx(0.01, rel=1e-4)

    def test_foreign_block_that_folds_its_identity(self):
        model = nn.Sequential(randomise(Folded()))
        references = observe(model, 1, 4, 6, 6)
        switch_to_deploy(model)
        (difference,) = compare_blocks(references, model).values()
        assert difference.kernel > 1e-7 and difference.is_within(RTOL)

    @pytest.mark.parametrize('stride', [8, 16])
    def test_large_stride(self, stride):
        """The first place of the kernel has its first row in the padding."""
        block = randomise(RepVGGBlock(3, 4, stride=stride))
        references = observe(block, 1, 3, stride, stride)
        block.switch_to_deploy()
        assert compare_blocks(references, block)[''].is_within(RTOL)
        with torch.no_grad():
            block.branch_reparam.weight[:, :, 0] = 0
        assert not compare_blocks(references, block)[''].is_within(RTOL)

    @pytest.mark.parametrize('gamma', [1e-9, 1e-13, 1e-17, 0.0])
    def test_dead_block_with_a_bias(self, gamma):
        block = randomise(RepVGGBlock(4, 4)).double()
        with torch.no_grad():
            for norm in block.last_norms():
                norm.weight.fill_(gamma)
        block.float()
        references = observe(block, 1, 4, 6, 6)
        block.switch_to_deploy()
        assert compare_blocks(references, block)[''].is_within(RTOL)

    def test_pruned_foreign_weight_keeps_its_dtype(self):
        model = nn.Sequential(Small())
        prune.l1_unstructured(model[0].conv, 'weight', 0.5)
        observe(model, 1, 4, 6, 6)
        block_references(model, {'0': Call((torch.ones(1, 4, 2, 2),), {})})
        assert model[0].conv.weight.dtype is torch.float32

    @pytest.mark.parametrize('missing', ['check_foldable', 'linear', 'geometry'])
    def test_foreign_block_with_a_name_of_ours(self, missing):
        """It is none of ours for one or two of the names."""
        model = nn.Sequential(randomise(Small()))
        for part in {'check_foldable', 'linear', 'geometry'} - {missing}:
            setattr(model[0], part, lambda *args: None)
        references = observe(model, 1, 4, 6, 6)
        assert compare_blocks(references, model)['0'].is_within(RTOL)

    def test_an_identity_in_a_kernel_of_ours_counts(self):
        """Where a block adds little to its input, that little is not held by itself."""
        block = ConvNormBlock(4, 4, 3, norm_cfg=dict(type='BN', eps=0.0)).double()
        nn.init.dirac_(block.branch_kxk.conv.weight)
        model = nn.Sequential(block)
        references = observe(model, 1, 4, 6, 6)
        switch_to_deploy(model)
        with torch.no_grad():
            block.branch_reparam.weight *= 1 + 5e-6
        (difference,) = compare_blocks(references, model).values()
        assert difference.kernel == pytest.approx(5e-6, rel=1e-3)

    def test_same_padding_by_keyword(self):
        class Keyword(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                conv_cfg = dict(type='Conv2dAdaptivePadding')
                self.block = randomise(RepVGGBlock(4, 4, stride=2, conv_cfg=conv_cfg))

            def forward(self, x: Tensor) -> Tensor:
                return self.block(x=x)

        model = Keyword()
        references = observe(model, 1, 4, 9, 9)
        switch_to_deploy(model)
        assert compare_blocks(references, model)['block'].is_within(RTOL)

    @pytest.mark.parametrize('mode', ['reflect', 'circular'])
    def test_more_padding_than_a_small_map_has(self, mode):
        block = randomise(RepVGGBlock(4, 4, padding=9, padding_mode=mode))
        references = observe(block, 1, 4, 32, 32)
        block.switch_to_deploy()
        assert compare_blocks(references, block)[''].is_within(RTOL)

    def test_what_has_no_float64(self):
        model = nn.Sequential(Small())
        constant = torch.ones(4, 4, 1, 1)
        model[0].forward = lambda x: nn.functional.conv2d(x, constant)
        with pytest.raises(ValueError, match=r'^0: RuntimeError: '):
            observe(model, 1, 4, 6, 6)

    def test_an_error_of_several_lines(self):
        model = nn.Sequential(Small())

        def forward(x: Tensor) -> Tensor:
            if x.dtype is torch.float64:
                raise OSError('first\nsecond')
            return x

        model[0].forward = forward
        with pytest.raises(ValueError, match=r'^0: OSError: first$'):
            observe(model, 1, 4, 6, 6)
