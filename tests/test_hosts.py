"""Networks of mmpretrain and mmseg with a backbone from here, in training and deployed."""

import pytest
import torch
from laws import assert_same, randomise
from mmengine.config import ConfigDict
from mmengine.registry import DefaultScope
from mmengine.structures import PixelData
from mmpretrain.registry import MODELS as PRETRAIN_MODELS
from mmpretrain.structures import DataSample
from mmseg.registry import MODELS as SEG_MODELS
from mmseg.structures import SegDataSample
from torch import nn

from mmrep.reparam import branch_by_branch, reparam_blocks, switch_to_deploy

CLASSES = 5
TINY = dict(num_blocks=(1, 1, 1, 1), width_factor=(1, 1, 1, 1))
NORM = dict(type='SyncBN', requires_grad=True)
SMALL = dict(base_channels=4)
#: Backbones, with the channels of their last two stages.
BACKBONES = {
    'RepVGG': (dict(type='mmrep.RepVGG', arch=TINY, **SMALL), (16, 32)),
    'RepVGG-D2se': (
        dict(type='mmrep.RepVGG', arch=TINY | dict(se_cfg=dict(ratio=2)), **SMALL),
        (16, 32),
    ),
    'DBBResNet-18': (dict(type='mmrep.DBBResNet', depth=18, **SMALL), (16, 32)),
    'DBBResNetV1c-50': (dict(type='mmrep.DBBResNetV1c', depth=50, **SMALL), (64, 128)),
    'ReparamResNet of RepVGG blocks': (
        dict(
            type='mmrep.ReparamResNet',
            depth=18,
            block_cfg=dict(type='mmrep.RepVGGBlock'),
            **SMALL,
        ),
        (16, 32),
    ),
    'DBBMobileNetV1': (
        dict(type='mmrep.DBBMobileNetV1', width_factor=0.125, out_indices=(3, 4)),
        (64, 128),
    ),
}


def classifier(name: str) -> nn.Module:
    """An image classifier on a backbone's last stage."""
    backbone, (_, channels) = BACKBONES[name]
    return PRETRAIN_MODELS.build(
        dict(
            type='ImageClassifier',
            backbone={'out_indices': (2, 3), **backbone},
            neck=dict(type='GlobalAveragePooling'),
            head=dict(
                type='LinearClsHead',
                num_classes=CLASSES,
                in_channels=channels,
                loss=dict(type='CrossEntropyLoss'),
            ),
        )
    )


def segmentor(name: str) -> nn.Module:
    """An FCN on a backbone's last stage, with an auxiliary head on the one before."""
    backbone, widths = BACKBONES[name]

    def head(index: int, **options) -> dict:
        return dict(
            type='FCNHead',
            in_channels=widths[index],
            in_index=index,
            channels=4,
            num_convs=1,
            num_classes=CLASSES,
            norm_cfg=NORM,
            **options,
        )

    return SEG_MODELS.build(
        dict(
            type='EncoderDecoder',
            data_preprocessor=dict(type='SegDataPreProcessor', size=(64, 64)),
            backbone={'out_indices': (2, 3), 'norm_cfg': NORM, **backbone},
            decode_head=head(1),
            auxiliary_head=head(0),
            train_cfg=dict(),
            test_cfg=ConfigDict(mode='whole'),
        )
    )


def class_samples() -> list[DataSample]:
    """A label for each of two images."""
    return [DataSample().set_gt_label(label) for label in (1, 3)]


def map_samples() -> list[SegDataSample]:
    """A map of labels for each of two images."""
    shape = (64, 64)
    info = dict(ori_shape=shape, img_shape=shape, pad_shape=shape, padding_size=[0] * 4)
    maps = [PixelData(data=torch.randint(CLASSES, (1, *shape))) for _ in range(2)]
    return [SegDataSample(gt_sem_seg=labels, metainfo=info) for labels in maps]


HOSTS = {
    'mmpretrain': (classifier, class_samples),
    'mmseg': (segmentor, map_samples),
}


@pytest.mark.parametrize('name', BACKBONES)
@pytest.mark.parametrize('host', HOSTS)
def test_trains_predicts_and_deploys(host, name):
    with DefaultScope.overwrite_default_scope(host):
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
    with torch.no_grad(), branch_by_branch(model):
        logits = model(x, samples, mode='tensor')
        predictions = scores(model(x, samples, mode='predict'))
    assert len(reparam_blocks(model)) > 1
    report = switch_to_deploy(model)
    assert report.switched
    assert all(name.startswith('backbone.') for name in report.switched)
    assert model.backbone.deploy
    with torch.no_grad():
        assert_same(logits, model(x, samples, mode='tensor'))
        assert_same(predictions, scores(model(x, make_samples(), mode='predict')))


def scores(predictions: list) -> list[torch.Tensor]:
    """The numbers in a host's predictions."""
    return [
        p.seg_logits.data if isinstance(p, SegDataSample) else p.pred_score
        for p in predictions
    ]
