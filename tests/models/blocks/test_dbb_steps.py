"""A training step of DBB beside its authors': what it keeps, and what happens around it.

A step alone is compared in test_diverse_branch_block.py, for many geometries.
"""

import copy

import pytest
import torch
from laws import (
    assert_same,
    assert_same_step,
    image,
    kept_maps,
    randomise,
    running_statistics,
    step,
)
from official_dbb import OfficialDBB
from torch import nn

from mmrep.models.blocks import DiverseBranchBlock

X = image(4, 4, 16, 16)


def official_pair(**options) -> tuple[OfficialDBB, DiverseBranchBlock]:
    """The authors' block and ours, of the same weights."""
    stride = options.get('stride', 1)
    geometry = dict(stride=(stride, stride), groups=options.get('groups', 1))
    official = randomise(OfficialDBB(4, 4, (3, 3), **geometry).double())
    ours = DiverseBranchBlock(4, 4, **options).double()
    ours.load_state_dict(official.state_dict())
    return official, ours


@pytest.mark.parametrize('options', [{}, dict(groups=4), dict(stride=2)], ids=str)
def test_memory(options):
    """Less than the authors' block, whose maps are padded; with ``with_cp``, none."""
    official, ours = official_pair(**options)
    assert kept_maps(ours, X) < kept_maps(official, X)
    ours.with_cp = True
    assert kept_maps(ours, X) <= 0.2


@pytest.mark.parametrize('with_cp', [False, True])
@pytest.mark.parametrize('options', [{}, dict(groups=4), dict(stride=2)], ids=str)
class TestSteps:
    """Of the authors' block, which recomputes nothing."""

    def test_statistics_move_once(self, options, with_cp):
        official, ours = official_pair(**options)
        ours.with_cp = with_cp
        for count in (1, 2, 3):
            x = image(2, 4, 7, 8, seed=count)
            assert_same_step(step(official, x), step(ours, x))
            counters = [
                b for key, b in ours.named_buffers() if key.endswith('num_batches_tracked')
            ]
            assert {int(counter) for counter in counters} == {count}

    def test_two_passes_before_the_backward_pass(self, options, with_cp):
        """As of two views of an image: the statistics move in between."""

        def outcome(model: nn.Module) -> list:
            views = image(2, 4, 7, 8), 3 + 2 * image(2, 4, 7, 8, seed=5)
            outputs = [model(view) for view in views]
            loss = sum((y * image(*y.shape, seed=6)).sum() for y in outputs)
            named = dict(model.named_parameters())
            gradients = torch.autograd.grad(loss, list(named.values()))
            return [
                outputs,
                dict(zip(named, gradients, strict=True)),
                running_statistics(model),
            ]

        official, ours = official_pair(**options)
        ours.with_cp = with_cp
        assert_same(outcome(official), outcome(ours))

    def test_a_graph_that_is_retained(self, options, with_cp):
        ours = official_pair(**options)[1]
        ours.with_cp = with_cp
        weights = list(ours.parameters())
        loss = ours(X).square().sum()
        first = torch.autograd.grad(loss, weights, retain_graph=True)
        assert_same(first, torch.autograd.grad(loss, weights))
        with pytest.raises(RuntimeError, match='second time'):
            torch.autograd.grad(loss, weights)

    def test_eval_mode_and_norm_eval(self, options, with_cp):
        official, ours = official_pair(**options)
        ours.with_cp, ours.one_conv = with_cp, False
        before = running_statistics(ours)
        for mode in ('eval', 'norm_eval'):
            ours.train(mode == 'norm_eval')
            for module in ours.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
            output = step(ours, X)
            # The authors' border has no gradient; that of a fixed norm has one.
            assert_same(official.eval()(X), output['outputs']['output'])
            assert_same(before, output['statistics'], tolerance=0)
            assert output['gradients'].keys() == {'input', *dict(ours.named_parameters())}

    def test_weights_of_another(self, options, with_cp):
        """As ``torch.func.functional_call`` has them in the place of the block's own."""
        if with_cp:
            pytest.skip("torch's checkpointing computes with the block's own")
        ours = official_pair(**options)[1]
        other = copy.deepcopy(ours)
        with torch.no_grad():
            for weight in other.parameters():
                weight.mul_(1.5)
        weights = {
            k: p.detach().clone().requires_grad_() for k, p in other.named_parameters()
        }
        loss = torch.func.functional_call(ours, weights, (X,)).square().sum()
        expected = torch.autograd.grad(other(X).square().sum(), list(other.parameters()))
        assert_same(expected, torch.autograd.grad(loss, list(weights.values())))
