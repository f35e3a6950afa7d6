"""What a verification refuses, and what it says."""

import copy
from collections.abc import Callable

import pytest
import torch
from laws import randomise
from mmengine.config import Config
from tiny_projects import classifier_model
from torch import Tensor, nn

from mmrep.deployment import Verification, VerificationError, build_model, enter_scope
from mmrep.deployment.verification import observe, verify
from mmrep.models.blocks import RepVGGBlock
from mmrep.reparam import switch_to_deploy

SHAPE = (1, 3, 20, 28)
RTOL = 1e-4


def classifier(change: Callable[[nn.Module], None] | None = None) -> nn.Module:
    config = Config(dict(default_scope='mmpretrain', model=classifier_model()))
    enter_scope(config)
    model = randomise(build_model(config))
    if change is not None:
        with torch.no_grad():
            change(model)
    return model


def compare(
    model: nn.Module,
    fault: Callable[[nn.Module], None] | None = None,
    rtol: float = RTOL,
) -> Verification:
    """Observe, fuse, perhaps break, and verify."""
    train_form = observe(model, SHAPE, seed=0)
    deployed = copy.deepcopy(model)
    switch_to_deploy(deployed)
    if fault is not None:
        with torch.no_grad():
            fault(deployed)
    return verify(train_form, deployed, rtol)


def scale_a_conv(model: nn.Module) -> None:
    model.backbone.stage_2[0].branch_reparam.weight *= 1.01


def zero_head(model: nn.Module) -> None:
    model.head.fc.weight.zero_()


def small_head(model: nn.Module) -> None:
    model.head.fc.weight *= 1e-6


def large_bias(model: nn.Module) -> None:
    model.head.fc.bias += 1e6


class TestTheHeadHidesTheBackbone:
    @pytest.mark.parametrize('change', [None, small_head, large_bias])
    def test_refused(self, change):
        says = r'^backbone\.stage_2\.0 differs by 0\.01 .* from its branches'
        with pytest.raises(VerificationError, match=says):
            compare(classifier(change), scale_a_conv)

    @pytest.mark.parametrize('change', [small_head, large_bias])
    def test_said(self, change):
        found = compare(classifier(change))
        assert found.dependence['output'] < 1e-4 < found.dependence['backbone[0]']
        (remark,) = found.remarks()
        assert 'output hardly depends on the input' in remark

    def test_nothing_to_say(self):
        found = compare(classifier())
        assert found.remarks() == []
        assert found.outputs.keys() == {'output', 'backbone[0]'}
        assert found.record()['worst_block']['name'] == found.worst_block
        assert found.blocks[found.worst_block].worst == max(
            block.worst for block in found.blocks.values()
        )


class TestRefused:
    def refused(self, match: str, *arguments) -> None:
        with pytest.raises(VerificationError, match=match) as info:
            compare(*arguments)
        assert '\n' not in str(info.value)

    def test_no_output_depends_on_the_input(self):
        class Constant(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.block = randomise(RepVGGBlock(3, 4))

            def forward(self, x: Tensor) -> Tensor:
                return 0 * self.block(x).mean() + 1.0

        self.refused('no output depends on the input', Constant().eval())

    def test_one_output_does(self):
        found = compare(classifier(zero_head))
        assert found.dependence['output'] == 0
        assert 'output hardly depends on the input (0)' in found.remarks()[0]

    def test_zero_everywhere(self):
        def silence(model: nn.Module) -> None:
            zero_head(model)
            model.head.fc.bias.zero_()

        self.refused('^output of the train form is zero everywhere', classifier(silence))

    @pytest.mark.parametrize('value', [float('nan'), float('inf')])
    def test_not_finite(self, value):
        def spoil(model: nn.Module) -> None:
            model.head.fc.bias[0] = value

        self.refused('^output of the train form is not finite', classifier(spoil))

    def test_two_runs_differ(self):
        model = classifier()
        model.head.register_forward_pre_hook(
            lambda _, args: (nn.functional.dropout(args[0][0], 0.5),)
        )
        says = 'between two runs of the deploy form on one input'
        self.refused(says, model)

    def test_what_stands_between_blocks(self):
        def shift(model: nn.Module) -> None:
            model.head.fc.bias += 0.1

        says = '^output differs by .* from the train form.*every block is right'
        self.refused(says, classifier(), shift)

    @pytest.mark.parametrize('problem', ['zero everywhere', 'not finite'])
    def test_deploy_form(self, problem):
        def spoil(model: nn.Module) -> None:
            model.head.fc.weight *= 0 if 'zero' in problem else float('nan')
            model.head.fc.bias *= 0

        self.refused(f'^output of the deploy form is {problem}', classifier(), spoil)

    def test_features(self):
        """The head does not see all that the backbone gives."""
        model = classifier()
        model.backbone.out_indices = (0, 3)

        def shift(model: nn.Module) -> None:
            first = model.backbone.stage_1
            first.register_forward_hook(lambda *args: args[-1] * 1.001)
            model.backbone.stage_2.register_forward_pre_hook(
                lambda _, args: (args[0] / 1.001,)
            )

        self.refused(r'^backbone\[0\] differs by .* from the train form', model, shift)


class Chaotic(nn.Module):
    """A block, and the logistic map over and over: each time errors double."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.block = randomise(RepVGGBlock(3, 8))
        self.times = times
        self.shift = 0.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x).sigmoid() + self.shift
        for _ in range(self.times):
            x = 4 * x * (1 - x)
        return x


class Cancelling(nn.Module):
    """A block whose branches lose what float32 has by cancelling each other."""

    def __init__(self) -> None:
        super().__init__()
        self.block = randomise(RepVGGBlock(3, 8, act_cfg=None))
        with torch.no_grad():
            first, second, *_ = self.block.branches().values()
            second.conv.weight.copy_(-1e6 * first.conv.weight[:, :, 1:2, 1:2])
            first.conv.weight[:, :, 1:2, 1:2] *= 1e6
            for norm in (first.norm, second.norm):
                norm.load_state_dict(randomise(nn.BatchNorm2d(8)).state_dict())
            first.norm.bias.sub_(0.01)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class TestIllConditioned:
    def test_the_branches_lose_their_digits(self):
        found = compare(Cancelling().eval())
        error = found.outputs['output'].rel_l2
        assert RTOL < error <= found.sensitivity['output']

    def test_the_blocks_decide(self):
        found = compare(Chaotic(times=20).eval())
        error = found.outputs['output'].rel_l2
        assert RTOL < error <= found.sensitivity['output']
        assert 'output is ill-conditioned' in found.remarks()[0]
        assert found.record()['ill_conditioned'] == found.sensitivity

    def test_they_do_not_decide_for_more_than_rounding(self):
        def shift(model: nn.Module) -> None:
            model.shift = 1e-3

        says = '^output differs by .* from the train form.*every block is right'
        with pytest.raises(VerificationError, match=says):
            compare(Chaotic(times=4).eval(), shift)

    def test_they_do_not_excuse_a_tolerance_below_rounding(self):
        with pytest.raises(VerificationError, match='which is more than 1e-08'):
            compare(classifier(), rtol=1e-8)

    def test_a_wrong_block_is_refused_all_the_same(self):
        def scale(model: nn.Module) -> None:
            model.block.branch_reparam.weight *= 1.01

        with pytest.raises(VerificationError, match=r'^block differs by .* from its'):
            compare(Chaotic(times=20).eval(), scale)


class Classes(nn.Module):
    """A map of classes, and the places of those above the mean, as many as there are."""

    def __init__(self) -> None:
        super().__init__()
        self.block = randomise(RepVGGBlock(3, 4))

    def forward(self, x: Tensor) -> dict:
        y = self.block(x)
        return dict(classes=y.argmax(1), places=(y > y.mean()).nonzero(), none=y[:0])


def test_outputs_that_are_no_real_numbers():
    found = compare(Classes().eval())
    assert found.dependence.keys() == {'output[classes]', 'output[places]'}
    assert found.remarks() == []


def test_reference_is_branch_by_branch():
    model = classifier()
    kernels = []
    for block in model.backbone.modules():
        if isinstance(block, RepVGGBlock):
            block.one_conv = True
            derive = block.equivalent_kernel_bias
            block.equivalent_kernel_bias = lambda *a, derive=derive: (
                kernels.append(1) or derive(*a)
            )
    observe(model, SHAPE, seed=0)
    assert not kernels
    model(torch.randn(SHAPE))
    assert kernels
