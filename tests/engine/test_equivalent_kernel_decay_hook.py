"""RepVGG's custom L2: a term of the loss, added to the gradients instead."""

import copy

import pytest
import torch
from laws import assert_differ, assert_same, image, randomise
from mmengine.registry import HOOKS
from tiny_runner import TinyModel, tiny_runner

from mmrep.errors import ConfigError
from mmrep.models.blocks import RepVGGBlock

HOOK = dict(type='mmrep.EquivalentKernelDecayHook', weight_decay=0.1)


def penalty(block: RepVGGBlock) -> torch.Tensor:
    """Tap by tap; the scales of the norms are constants."""
    scale3, scale1 = (
        (b.norm.weight / (b.norm.running_var + b.norm.eps).sqrt()).detach()[:, None]
        for b in (block.branch_3x3, block.branch_1x1)
    )
    kernel3, kernel1 = block.branch_3x3.conv.weight, block.branch_1x1.conv.weight
    total = 0
    for row in range(3):
        for column in range(3):
            tap = kernel3[:, :, row, column]
            if row == column == 1:
                tap = scale3 * tap + scale1 * kernel1[:, :, 0, 0]
                tap = tap / (scale3**2 + scale1**2).sqrt()
            total = total + tap.square().sum()
    return total


def model() -> TinyModel:
    return randomise(TinyModel())


@pytest.mark.parametrize('steps', [1, 2], ids=['every batch', 'two batches a step'])
def test_a_step_is_that_of_the_loss_with_the_penalty(tmp_path, steps):
    """Also where gradients are accumulated: the penalty is added once a step."""
    optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.5), accumulative_counts=steps)
    options = dict(optim_wrapper=optim_wrapper, custom_hooks=[HOOK])
    runner = tiny_runner(tmp_path, model=model(), **options)
    batches = list(runner.build_dataloader(runner._train_dataloader))
    assert len(batches) == 2
    runner.train()

    expected = model().train()
    without = copy.deepcopy(expected)
    for network, weight_decay in ((expected, 0.1), (without, 0)):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
        for i, batch in enumerate(batches, start=1):
            loss = network(**batch, mode='loss')['loss'] / steps
            if i % steps == 0:
                loss = loss + weight_decay / 2 * penalty(network.block)
            loss.backward()
            if i % steps == 0:
                optimizer.step()
                optimizer.zero_grad()
    found = runner.model.state_dict()
    assert_same(dict(expected.state_dict()), dict(found))
    key = 'block.branch_1x1.conv.weight'
    assert_differ(without.state_dict()[key], found[key])


def test_a_branch_that_is_frozen_has_no_gradient():
    block = randomise(RepVGGBlock(4, 4))
    block.branch_1x1.requires_grad_(False)
    block(image(2, 4, 5, 5, dtype=torch.float32)).sum().backward()
    before = block.branch_3x3.conv.weight.grad.clone()
    HOOKS.build(HOOK).add_gradients([block])
    assert block.branch_1x1.conv.weight.grad is None
    assert_differ(before, block.branch_3x3.conv.weight.grad)


def test_it_ends_with_the_training(tmp_path):
    runner = tiny_runner(tmp_path, model=model(), custom_hooks=[HOOK])
    runner.train()
    optimizer = runner.optim_wrapper.optimizer
    assert not optimizer._optimizer_step_pre_hooks


def test_a_model_without_blocks(tmp_path):
    network = model()
    network.block.switch_to_deploy()
    with pytest.raises(ConfigError, match='no RepVGG block in train form: leave it out'):
        tiny_runner(tmp_path, model=network, custom_hooks=[HOOK]).train()
