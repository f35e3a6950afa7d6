import pytest
import torch
from laws import assert_differ, assert_same, image
from mmengine.config import Config
from tiny_projects import DBB_RESNET, REPVGG, classifier_model
from torch import nn

from mmrep.benchmark import BenchmarkModel, models_of
from mmrep.deployment import enter_scope
from mmrep.hosts import forward
from mmrep.reparam import branch_by_branch, has_running_statistics, reparam_blocks

X = image(2, 3, 32, 32, dtype=torch.float32)
#: As small as a network with a name can be: one channel in the stem.
A0 = dict(type='mmrep.RepVGG', arch='A0', base_channels=8)


def models(backbone: dict, in_channels: int) -> dict[str, BenchmarkModel]:
    config = Config(
        dict(default_scope='mmpretrain', model=classifier_model(backbone, in_channels))
    )
    enter_scope(config)
    return {model.name: model for model in models_of(config)}


@pytest.fixture
def without_timm(monkeypatch):
    """It has no small ones."""
    monkeypatch.setattr('mmrep.benchmark.models._timm', lambda name: iter(()))


@torch.no_grad()
def output(model: nn.Module) -> torch.Tensor:
    # mmpretrain leaves its fused convs in train mode, which means nothing.
    assert not any(m.training for m in model.modules() if not isinstance(m, nn.Conv2d))
    return forward(model, X)


def assert_two_forms(model: BenchmarkModel) -> None:
    """They are one function, one of them fused, and every norm does something."""
    with branch_by_branch(model.train_form):
        assert_same(output(model.train_form), output(model.deploy_form))
    assert not any(getattr(m, 'deploy', False) for m in model.train_form.modules())
    blocks = reparam_blocks(model.deploy_form).values()
    assert blocks and all(block.deploy for block in blocks)
    norms = list(filter(has_running_statistics, model.train_form.modules()))
    assert norms and all(norm.running_mean.std() > 0 for norm in norms)
    assert not any(map(has_running_statistics, model.deploy_form.modules()))


def test_mmpretrains_repvgg_has_the_same_weights(without_timm):
    found = models(dict(A0, base_channels=64), 1280)
    assert list(found) == ['mmrep', 'mmpretrain']
    for model in found.values():
        assert_two_forms(model)
    ours, theirs = (model.train_form for model in found.values())
    assert type(theirs.backbone).__module__.startswith('mmpretrain.')
    assert_same(output(ours), output(theirs))
    # And weights of its own to train.
    with torch.no_grad():
        theirs.head.fc.weight.add_(1)
    assert_differ(output(ours), output(theirs))


def test_no_peer_for_an_architecture_of_ones_own():
    """mmpretrain's would compute something else for some of them."""
    found = models(REPVGG, 16)
    assert list(found) == ['mmrep']
    assert_two_forms(found['mmrep'])


def test_no_peer_that_lacks_an_option(without_timm):
    """mmpretrain's RepVGG has one kind of block."""
    block = dict(type='mmrep.DiverseBranchBlock')
    found = models(dict(A0, block_cfg=block), 160)
    assert list(found) == ['mmrep']


def test_the_plain_resnet():
    found = models(DBB_RESNET, 32)
    assert list(found) == ['mmrep', 'plain']
    assert_two_forms(found['mmrep'])
    ours, plain = found['mmrep'].train_form, found['plain'].train_form
    assert type(plain.backbone).__module__.startswith('mmpretrain.')
    assert type(plain.backbone).__name__ == 'ResNet'
    assert found['plain'].deploy_form is plain
    assert output(plain).shape == output(ours).shape
    # The same network: a conv for every block.
    convs = [
        [
            (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride)
            for name, conv in model.backbone.named_modules()
            if isinstance(conv, nn.Conv2d)
        ]
        for model in (found['mmrep'].deploy_form, plain)
    ]
    assert sorted(convs[0]) == sorted(convs[1])


def test_the_same_in_every_run():
    """Times of several runs are of the same weights."""
    first, second = (models(REPVGG, 16)['mmrep'] for _ in range(2))
    assert torch.equal(output(first.train_form), output(second.train_form))
