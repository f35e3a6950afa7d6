"""Averages of weights, as mmengine takes them, of models with blocks in both forms."""

from types import SimpleNamespace

import pytest
import torch
from laws import (
    always_one_conv,
    assert_differ,
    assert_same,
    count_convs,
    image,
    randomise,
)
from mmengine.hooks import EMAHook
from mmengine.model import ExponentialMovingAverage
from torch import Tensor, nn

from mmrep.models.backbones import DBBMobileNetV1, DBBResNet, RepVGG
from mmrep.reparam import branch_by_branch, switch_to_deploy

ARCH = dict(num_blocks=(1, 2), width_factor=(0.125, 0.125))
MODELS = {
    'RepVGG': lambda: RepVGG(ARCH, out_indices=(0, 1)),
    'DBBResNet': lambda: DBBResNet(18, base_channels=4, stem_channels=4),
    'DBBMobileNetV1': lambda: DBBMobileNetV1(width_factor=0.125),
}

pytestmark = [
    pytest.mark.parametrize('name', MODELS),
    pytest.mark.parametrize('buffers', [False, True], ids=['parameters', 'all']),
]
X = image(1, 3, 32, 32)


def drawn(name: str) -> nn.Module:
    return randomise(MODELS[name]().double().eval(), seed=1)


def state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters and running statistics."""
    return {
        key: tensor.clone()
        for key, tensor in model.state_dict().items()
        if tensor.is_floating_point()
    }


@torch.no_grad()
def by_branches(model: nn.Module) -> tuple[Tensor, ...]:
    with branch_by_branch(model):
        return model(X)


@torch.no_grad()
def as_one_conv(model: nn.Module) -> tuple[Tensor, ...]:
    with always_one_conv(model):
        return model(X)


@torch.no_grad()
def test_both_forms_of_an_average(name, buffers):
    model = drawn(name)
    average = ExponentialMovingAverage(model, momentum=0.25, update_buffers=buffers)
    # The first update copies, the second averages.
    average.update_parameters(model)
    as_one_conv(average)
    first, second = state(model), state(randomise(model, seed=2))
    average.update_parameters(model)

    parameters = dict(model.named_parameters())
    expected = {
        key: value.lerp(second[key], 0.25) if key in parameters or buffers else second[key]
        for key, value in first.items()
    }
    assert_same(expected, state(average.module))
    twin = MODELS[name]().double().eval()
    assert not twin.load_state_dict(expected, strict=False).unexpected_keys
    reference = by_branches(twin)
    assert_differ(by_branches(model)[-1], reference[-1])
    assert_same(reference, by_branches(average))
    assert_same(reference, as_one_conv(average))
    assert switch_to_deploy(average).switched
    assert_same(reference, average(X))
    # The model itself goes on as it was.
    assert_same(second, state(model))
    assert not model.deploy


@torch.no_grad()
def test_what_the_hook_swaps_in_is_seen_at_once(name, buffers):
    """By an evaluation with equivalent kernels, though it swaps through ``.data``."""
    model = drawn(name)
    runner = SimpleNamespace(model=model, iter=0)
    hook = EMAHook(momentum=0.25, update_buffers=buffers)
    hook.before_run(runner)
    hook.after_train_iter(runner, 0)
    randomise(model, seed=2)
    hook.after_train_iter(runner, 1)

    with always_one_conv(model):
        own = model(X)
        hook.before_val_epoch(runner)
        averaged = model(X)
        assert_same(by_branches(model), averaged)
        assert_differ(own[-1], averaged[-1])
        hook.after_val_epoch(runner)
        assert_same(own, model(X), tolerance=0)
        with branch_by_branch(model):
            several = count_convs(model, X)
        assert count_convs(model, X) < several
