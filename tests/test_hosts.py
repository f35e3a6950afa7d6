"""Networks of mmpretrain and mmseg with a backbone of mmrep, in both forms."""

import copy

import pytest
import torch
from host_models import (
    BACKBONES,
    CLASSES,
    HOSTS,
    class_samples,
    classifier,
    map_samples,
    segmentor,
    soften,
)
from laws import assert_differ, assert_same, image, randomise
from mmpretrain.models import AverageClsScoreTTA
from mmpretrain.structures import DataSample
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from mmrep.reparam import branch_by_branch, reparam_blocks, switch_to_deploy

Samples = list[DataSample] | list[SegDataSample]


@pytest.mark.parametrize(
    'name',
    [
        pytest.param(n, marks=pytest.mark.long)
        if n in ('DBBResNetV1c-50', 'DBBMobileNetV1')
        else n
        for n in BACKBONES
    ],
)
@pytest.mark.parametrize('host', HOSTS)
def test_trains_predicts_and_deploys(host, name):
    build, make_samples = HOSTS[host]
    model = build(name)
    model.init_weights()
    x, samples = torch.randn(2, 3, 64, 64), make_samples()

    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = model(x, samples, mode='loss')
    loss, _ = model.parse_losses(losses)
    assert len([key for key in losses if 'loss' in key]) == (2 if host == 'mmseg' else 1)
    loss.backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None]
    assert missing == []
    optimizer.step()

    randomise(model).double().eval()
    x = x.double()
    if host == 'mmpretrain':
        soften(model, x)
    with branch_by_branch(model):
        reference = computed(model, x, samples)
    assert_same(reference, computed(model, x, samples))
    assert len(reparam_blocks(model)) > 1
    report = switch_to_deploy(model)
    assert report.switched
    assert all(name.startswith('backbone.') for name in report.switched)
    assert model.backbone.deploy
    assert_same(reference, computed(model, x, samples))


@torch.no_grad()
def computed(model: nn.Module, x: Tensor, samples: Samples) -> dict:
    """What a host's model computes for images: features, logits, predictions, losses."""
    # Predictions are written into the samples.
    first, second, third = (copy.deepcopy(samples) for _ in range(3))
    losses = model(x, first, mode='loss')
    return dict(
        features=features(model, x),
        logits=model(x, second, mode='tensor'),
        predictions=scores(model(x, third, mode='predict')),
        losses={key: value for key, value in losses.items() if 'loss' in key},
    )


def features(model: nn.Module, x: Tensor) -> dict:
    """The features of a model after each of its parts."""
    if not hasattr(model, 'head'):
        return dict(backbone=model.extract_feat(x))
    stages = ('backbone', 'neck', 'pre_logits')
    return {stage: model.extract_feat(x, stage=stage) for stage in stages}


def scores(predictions: Samples) -> list[Tensor]:
    """The numbers in a host's predictions."""
    return [
        p.seg_logits.data if isinstance(p, SegDataSample) else p.pred_score
        for p in predictions
    ]


def test_several_auxiliary_heads():
    model = randomise(segmentor('RepVGG', auxiliary_heads=2)).double().eval()
    x, samples = image(2, 3, 64, 64), map_samples()
    with branch_by_branch(model):
        reference = computed(model, x, samples)
    names = {'decode.loss_ce', 'aux_0.loss_ce', 'aux_1.loss_ce'}
    assert reference['losses'].keys() == names
    switch_to_deploy(model)
    assert_same(reference, computed(model, x, samples))


def test_average_over_views():
    """mmpretrain's test-time augmentation around a model, in both forms."""
    images = image(2, 3, 64, 64, dtype=torch.float32)
    model = soften(randomise(classifier('DBBResNet-18')).eval(), images)
    tta = AverageClsScoreTTA(model)
    views = [list(images), list(images.flip(-1))]
    data = dict(inputs=views, data_samples=[class_samples(), class_samples()])

    def predict() -> Tensor:
        with torch.no_grad():
            return torch.stack(scores(tta.test_step(copy.deepcopy(data))))

    with branch_by_branch(tta):
        reference = predict()
        with torch.no_grad():
            single = [model(torch.stack(v), class_samples(), mode='predict') for v in views]
    first, second = (torch.stack(scores(samples)) for samples in single)
    assert_differ(first, second)
    assert_same((first + second) / 2, reference)
    assert reference.shape == (2, CLASSES)
    assert_same(reference, predict())
    report = switch_to_deploy(tta)
    assert all(name.startswith('module.backbone.') for name in report.switched)
    assert_same(reference, predict())
