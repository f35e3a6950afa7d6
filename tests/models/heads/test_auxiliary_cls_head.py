import pytest
import torch
from laws import assert_same, randomise, step
from mmengine.registry import DefaultScope
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from torch import nn

from mmrep.models.heads import AuxiliaryClsHead
from mmrep.reparam import switch_to_deploy

CLASSES = 3


def head_cfg(channels: int, weight: float = 1.0) -> dict:
    """A linear head of mmpretrain."""
    return dict(
        type='LinearClsHead',
        num_classes=CLASSES,
        in_channels=channels,
        loss=dict(type='CrossEntropyLoss', loss_weight=weight),
    )


@pytest.fixture
def classifier() -> nn.Module:
    """A RepVGG of three stages with a head on each."""
    arch = dict(num_blocks=(1, 1, 1), width_factor=(1, 1, 1))
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(
            dict(
                type='ImageClassifier',
                backbone=dict(
                    type='mmrep.RepVGG', arch=arch, base_channels=4, out_indices=(0, 1, 2)
                ),
                head=dict(
                    type='mmrep.AuxiliaryClsHead',
                    head=head_cfg(16),
                    auxiliary_heads=[head_cfg(4, 0.1), head_cfg(8, 0.1)],
                ),
            )
        )
    return randomise(model.double())


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, dtype=torch.float64)


def samples() -> list[DataSample]:
    """A label for each of two images."""
    return [DataSample().set_gt_label(label) for label in (0, 2)]


def test_losses(classifier, x):
    """Each is that of its head on its stage, weighed as its config says."""
    losses = classifier(x, samples(), mode='loss')
    assert losses.keys() == {'loss', 'aux_0.loss', 'aux_1.loss'}
    head = classifier.head
    feats = classifier.eval().extract_feat(x)
    labels = torch.tensor([0, 2])
    for module in head.aux_convs:
        module.train()
    for i, weight in enumerate((0.1, 0.1)):
        mean = head.aux_convs[i](feats[i]).mean((2, 3))
        logits = head.aux_heads[i].fc(mean)
        expected = weight * nn.functional.cross_entropy(logits, labels)
        assert_same(expected, head.loss(feats, samples())[f'aux_{i}.loss'])
    expected = nn.functional.cross_entropy(head.head.fc(feats[2].mean((2, 3))), labels)
    assert_same(expected, head.loss(feats, samples())['loss'])


def test_all_heads_are_trained(classifier, x):
    sum(classifier(x, samples(), mode='loss').values()).backward()
    assert all(p.grad.norm() > 0 for p in classifier.parameters())


def test_predicts_by_the_main_head_in_both_forms(classifier, x):
    classifier.eval()
    feats = classifier.extract_feat(x)
    logits = classifier(x, mode='tensor')
    assert_same(classifier.head.head.fc(feats[-1].mean((2, 3))), logits)
    (first, second) = classifier(x, samples(), mode='predict')
    assert_same(logits.softmax(1), torch.stack([first.pred_score, second.pred_score]))
    report = switch_to_deploy(classifier)
    assert 'head' in report.switched
    assert not [key for key in classifier.state_dict() if 'aux' in key]
    assert_same(logits, classifier(x, mode='tensor'))
    assert classifier(x, samples(), mode='loss').keys() == {'loss'}
    classifier.head.switch_to_deploy()
    assert step(classifier.backbone, x)['outputs']


def test_deploy_form_is_built_without_the_others(classifier):
    switch_to_deploy(classifier)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        head = AuxiliaryClsHead(head_cfg(16), [head_cfg(4), head_cfg(8)], deploy=True)
    head.load_state_dict(classifier.head.state_dict())


def test_one_feature_map_for_each_head(classifier, x):
    feats = classifier.extract_feat(x)[1:]
    with pytest.raises(ValueError, match=r'2 auxiliary heads and a main one got 2 feature'):
        classifier.head.loss(feats, samples())
