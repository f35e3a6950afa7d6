"""What the two-layer branches of DBB keep for the backward pass, and that it is enough."""

import copy

import pytest
import torch
from laws import (
    assert_same,
    assert_same_step,
    image,
    kept_for_backward,
    kept_maps,
    randomise,
    step,
)
from mmengine.model import revert_sync_batchnorm
from torch import nn

from mmrep.models.blocks import DiverseBranchBlock
from mmrep.models.layers.pointwise_spatial import PointwiseSpatial

BRANCHES = ('branch_1x1_kxk', 'branch_avg')
X = image(4, 4, 16, 16)

every_branch = pytest.mark.parametrize('name', BRANCHES)


def block(**options) -> DiverseBranchBlock:
    return randomise(DiverseBranchBlock(4, 4, **options).double())


def branch(name: str, **options) -> PointwiseSpatial:
    return getattr(block(**options), name)


@pytest.fixture
def recomputes(monkeypatch) -> list[bool]:
    """Whether each branch that ran kept less and computed again."""
    calls = []
    asked = PointwiseSpatial._makes_again

    def recorded(branch):
        calls.append(asked(branch))
        return calls[-1]

    monkeypatch.setattr(PointwiseSpatial, '_makes_again', recorded)
    return calls


class TestMemory:
    def test_of_a_branch(self):
        """What conv1 makes; of the kxk conv that is no average what it makes, too."""
        assert kept_maps(branch('branch_avg'), X) == 1
        assert kept_maps(branch('branch_1x1_kxk'), X) == 2
        assert kept_maps(branch('branch_avg', stride=2), X) == 1
        assert kept_maps(branch('branch_1x1_kxk', stride=2), X) == 1.25

    @every_branch
    def test_without_gradients_nothing_is_kept(self, name):
        with torch.no_grad():
            assert not kept_for_backward(branch(name), X)


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


def other_norms(module: nn.Module, kind: str) -> nn.Module:
    module = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(module))
    return module if kind == 'SyncBatchNorm' else revert_sync_batchnorm(module)


@every_branch
class TestWhatIsComputedAgain:
    def test_plain_norms(self, name, recomputes):
        branch(name)(X)
        assert recomputes == [True]

    @pytest.mark.parametrize('kind', ['SyncBatchNorm', "mmengine's"])
    def test_norms_that_may_talk_to_other_processes_are_not(self, name, recomputes, kind):
        plain = branch(name)
        other = other_norms(plain, kind)
        calls = []
        other.norm1.register_forward_hook(lambda *_: calls.append(1))
        expected, output = step(plain, X), step(other, X)
        assert recomputes == [True, False]
        assert calls == [1]
        assert_same_step(expected, output)

    def test_one_other_norm_is_enough(self, name, recomputes):
        module = branch(name)
        module.norm1 = other_norms(module.norm1, 'SyncBatchNorm')
        module(X)
        assert recomputes == [False]

    def test_norms_without_statistics_are_not(self, name, recomputes):
        module = branch(name, norm_cfg=dict(type='GN', num_groups=2))
        assert 'input' in step(module, X)['gradients']
        assert not any(recomputes)

    def test_inside_a_transform_of_torch_func(self, name, recomputes):
        """Which allows no hooks on what is kept."""
        module = branch(name).eval()
        gradient = torch.func.grad(lambda x: module(x).square().sum())(X)
        assert recomputes == [False]
        x = X.clone().requires_grad_()
        assert_same(torch.autograd.grad(module(x).square().sum(), x)[0], gradient)

    def test_not_in_a_trace(self, name, recomputes):
        torch.jit.trace(branch(name).eval(), X, check_trace=False)
        assert recomputes
        assert not any(recomputes)
