import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from laws import assert_same, image, randomise
from mmengine.config import Config
from torch import Tensor, nn

from mmrep.deployment import build_model, enter_scope
from mmrep.models.backbones import DBBResNet, RepVGG
from mmrep.models.blocks import DiverseBranchBlock, RepVGGBlock
from mmrep.reparam import (
    BlockDifference,
    BlockReference,
    Call,
    block_references,
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
    index = torch.randint(conv.weight.numel(), ())
    assert conv.weight.view(-1)[index] != 0
    conv.weight.view(-1)[index] = 0


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

    def test_a_tolerance_below_rounding(self):
        assert BlockDifference(2e-7, 2e-7).is_within(1e-9)
        assert not BlockDifference(2e-7, 2e-7).is_within(1e-9, torch.float64)


class Foreign(nn.Module):
    """A block of another package: of several tensors, and it writes into its input."""

    def __init__(self, wrong: float = 0.0) -> None:
        super().__init__()
        self.wrong = wrong
        self.branches = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)])

    def forward(self, x: Tensor, y: Tensor) -> dict:
        x.clamp_(max=1)
        return dict(first=[sum(branch(x) for branch in self.branches).relu()], rest=y)

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
        return self.block(x.clone(), y=x.mean(1))


class TestForeignBlocks:
    @pytest.mark.parametrize(('wrong', 'right'), [(0.0, True), (0.01, False)])
    def test_held_to_the_same(self, wrong, right):
        model = randomise(Owner(Foreign(wrong)))
        references = observe(model, 2, 4, 6, 6)
        switch_to_deploy(model)
        (difference,) = compare_blocks(references, model).values()
        assert difference.is_within(RTOL) is right
        assert difference.worst < 1e-6 or not right

    def test_nothing_is_known_of_what_it_takes(self):
        model = Owner(Foreign())
        with pytest.raises(ValueError, match='the input does not reach block'):
            block_references(model, {})

    def test_no_tensor(self, monkeypatch):
        model = Owner(Foreign())
        monkeypatch.setattr(Foreign, 'forward', lambda *args, **kwargs: 'text')
        with pytest.raises(ValueError, match='returns str, which is no tensor'):
            observe(model, 1, 4, 6, 6)


class TestBlocks:
    def test_outer_ones_stand_for_inner_ones(self):
        outer = RepVGGBlock(4, 4)
        outer.branch_1x1.add_module('conv', RepVGGBlock(4, 4, act_cfg=None))
        assert verifiable_blocks(nn.Sequential(outer)).keys() == {'0'}

    def test_plain_units(self):
        """Convs with a norm outside the blocks, which are fused, too."""
        model = DBBResNet(50, base_channels=4, deep_stem=True)
        names = verifiable_blocks(model).keys()
        assert {'stem.0', 'stem.3', 'layer1.0.conv1', 'layer1.0.conv2'} <= names
        assert {'layer1.0.conv3', 'layer1.0.downsample.0'} <= names
        references = observe(randomise(model), 1, 3, 32, 32)
        switch_to_deploy(model)
        assert compare_blocks(references, model).keys() == names

    def test_one_that_is_gone(self):
        references = observe(nn.Sequential(RepVGGBlock(4, 4)), 1, 4, 6, 6)
        with pytest.raises(ValueError, match='the deploy form has no 0'):
            compare_blocks(references, nn.Sequential(nn.Identity()))

    def test_another_geometry(self):
        references = observe(RepVGGBlock(4, 4), 1, 4, 8, 8)
        other = RepVGGBlock(4, 4, stride=2, deploy=True)
        with pytest.raises(ValueError, match='cannot be compared'):
            compare_blocks(references, other)

    def test_one_that_the_input_does_not_reach(self):
        block = randomise(RepVGGBlock(4, 4)).eval()
        references = block_references(block, {})
        block.switch_to_deploy()
        (difference,) = compare_blocks(references, block).values()
        assert 0 < difference.worst < 1e-6
        assert difference.seen is difference.branches_seen is None

    def test_same_padding(self):
        """Its kernel is that of inputs with one remainder by the stride."""
        options = dict(stride=3, conv_cfg=dict(type='Conv2dAdaptivePadding'))
        block = randomise(RepVGGBlock(4, 4, **options))
        with pytest.raises(ValueError, match='does not reach'):
            block_references(block, {})
        references = observe(block, 1, 4, 10, 11)
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
        with pytest.raises(ValueError, match='the output of 1 is not finite'):
            observe(model, 1, 4, 6, 6)


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
