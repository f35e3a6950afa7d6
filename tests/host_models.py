"""Networks of mmpretrain and mmseg with a small backbone of mmrep."""

import torch
from mmengine.config import ConfigDict
from mmengine.registry import DefaultScope
from mmengine.structures import PixelData
from mmpretrain.registry import MODELS as PRETRAIN_MODELS
from mmpretrain.structures import DataSample
from mmseg.registry import MODELS as SEG_MODELS
from mmseg.structures import SegDataSample
from torch import Tensor, nn

CLASSES = 5
#: The second block of the second stage has an identity branch.
TINY = dict(num_blocks=(1, 2, 1, 1), width_factor=(1, 1, 1, 1))
NORM = dict(type='SyncBN', requires_grad=True)
SMALL = dict(base_channels=4)
#: Backbones, and the channels of their last two stages.
BACKBONES = {
    'RepVGG': (dict(type='mmrep.RepVGG', arch=TINY, **SMALL), (16, 32)),
    'RepVGG-D2se': (
        dict(type='mmrep.RepVGG', arch=TINY | dict(se_cfg=dict(ratio=2)), **SMALL),
        (16, 32),
    ),
    'RepVGG of DBBs': (
        dict(
            type='mmrep.RepVGG',
            arch=TINY,
            block_cfg=dict(type='mmrep.DiverseBranchBlock'),
            **SMALL,
        ),
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
    with DefaultScope.overwrite_default_scope('mmpretrain'):
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


@torch.no_grad()
def soften(model: nn.Module, x: Tensor) -> nn.Module:
    """Scale a classifier's head, so that its scores for ``x`` are not all 0 or 1."""
    scale = model(x, mode='tensor').std()
    for parameter in model.head.parameters():
        parameter /= scale
    return model


def segmentor(name: str, auxiliary_heads: int | None = None) -> nn.Module:
    """An FCN on a backbone's last stage, with an auxiliary head on the one before.

    Args:
        name: The backbone.
        auxiliary_heads: Length of a list of auxiliary heads. Default: None, one head,
            not in a list.
    """
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

    several = auxiliary_heads is not None
    with DefaultScope.overwrite_default_scope('mmseg'):
        return SEG_MODELS.build(
            dict(
                type='EncoderDecoder',
                data_preprocessor=dict(type='SegDataPreProcessor', size=(64, 64)),
                backbone={'out_indices': (2, 3), 'norm_cfg': NORM, **backbone},
                decode_head=head(1),
                auxiliary_head=[head(0)] * auxiliary_heads if several else head(0),
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


#: How to build a network of each host, and annotations of two images.
HOSTS = {
    'mmpretrain': (classifier, class_samples),
    'mmseg': (segmentor, map_samples),
}
