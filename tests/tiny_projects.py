"""Tiny projects of OpenMMLab: a few images, and a config that trains on them.

Every image has a window of its class's brightness, so that a model can tell the classes
apart and a metric is not the same for every set of weights.
"""

from pathlib import Path

import numpy as np
from mmengine.config import Config
from PIL import Image

HEIGHT, WIDTH = 24, 16
CLASSES = ['dark', 'light']

REPVGG = dict(
    type='mmrep.RepVGG',
    arch=dict(
        num_blocks=[1, 2, 1, 1],
        width_factor=[0.125, 0.0625, 0.0625, 0.03125],
        group_layer_map=None,
        se_cfg=None,
    ),
    strides=(1, 2, 2, 1),
)
#: The output channels of the stages of ``REPVGG``.
REPVGG_CHANNELS = [8, 8, 16, 16]
DBB_RESNET = dict(type='mmrep.DBBResNet', depth=18, base_channels=4, stem_channels=8)

#: mmpretrain's networks that one ``switch_to_deploy`` fuses as a whole; 64 x 64 pixels.
ONE_SWITCH = {
    'RepLKNet': dict(
        type='mmpretrain.RepLKNet',
        arch=dict(
            large_kernel_sizes=[9, 7, 5, 3],
            layers=[1, 1, 1, 1],
            channels=[8, 8, 16, 16],
            small_kernel=3,
            dw_ratio=1,
        ),
        drop_path_rate=0,
    ),
    'LeViT': dict(type='mmpretrain.LeViT', arch='128s', img_size=64),
    'RepMLPNet': dict(
        type='mmpretrain.RepMLPNet',
        arch=dict(channels=[8, 16], depths=[1, 1], sharesets_nums=[1, 4]),
        img_size=64,
        out_indices=(1,),
        reparam_conv_kernels=(1, 3),
    ),
}


def classifier_model(backbone: dict = REPVGG, in_channels: int = 16) -> dict:
    """The config of an mmpretrain classifier."""
    return dict(
        type='ImageClassifier',
        data_preprocessor=dict(num_classes=2, mean=[127.5] * 3, std=[60.0] * 3),
        backbone=dict(backbone),
        neck=dict(type='GlobalAveragePooling'),
        head=dict(
            type='LinearClsHead',
            num_classes=2,
            in_channels=in_channels,
            loss=dict(type='CrossEntropyLoss'),
        ),
    )


def segmentor_model(backbone: dict = REPVGG, in_channels: int = 16) -> dict:
    """The config of an mmseg segmentor; its images are padded to ``HEIGHT x WIDTH``."""
    return dict(
        type='EncoderDecoder',
        data_preprocessor=dict(
            type='SegDataPreProcessor',
            size=(HEIGHT, WIDTH),
            mean=[127.5] * 3,
            std=[60.0] * 3,
        ),
        backbone=dict(backbone),
        decode_head=dict(
            type='FCNHead',
            in_channels=in_channels,
            in_index=0,
            channels=8,
            num_convs=1,
            concat_input=False,
            dropout_ratio=0.0,
            num_classes=2,
            norm_cfg=dict(type='BN'),
            loss_decode=dict(type='CrossEntropyLoss'),
        ),
        test_cfg=dict(mode='whole'),
    )


def write_classification(root: Path) -> Path:
    """Write images and the config of a classifier; returns the config's path."""
    for split, count in (('train', 4), ('val', 3)):
        for label, name in enumerate(CLASSES):
            for index in range(count):
                image, _ = _draw(label, seed=index + 10 * label)
                _save(image, root / f'data/{split}/{name}/{index}.png')
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='Resize', scale=(WIDTH, HEIGHT)),
        dict(type='PackInputs'),
    ]
    loaders = _loaders(
        lambda split: dict(
            type='CustomDataset',
            data_root=str(root / 'data'),
            data_prefix=split,
            metainfo=dict(classes=CLASSES),
            pipeline=pipeline,
        )
    )
    return _write(
        root / 'tiny_classifier.py',
        default_scope='mmpretrain',
        model=classifier_model(),
        **loaders,
        val_evaluator=dict(type='Accuracy', topk=(1,)),
        test_evaluator=dict(type='Accuracy', topk=(1,)),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        auto_scale_lr=dict(base_batch_size=8),
        default_hooks=dict(
            checkpoint=dict(type='CheckpointHook', interval=1),
            logger=dict(type='LoggerHook', interval=1),
            visualization=dict(type='VisualizationHook', enable=False),
        ),
        visualizer=dict(
            type='UniversalVisualizer', vis_backends=[dict(type='LocalVisBackend')]
        ),
        tta_model=dict(type='AverageClsScoreTTA'),
        tta_pipeline=_flipped_twice(dict(type='PackInputs')),
    )


def write_segmentation(root: Path) -> Path:
    """Write images and the config of a segmentor; returns the config's path."""
    for split, count in (('train', 4), ('val', 3)):
        for index in range(count):
            image, mask = _draw(label=1, seed=index)
            _save(image, root / f'data/images/{split}/{index}.png')
            _save(mask, root / f'data/masks/{split}/{index}.png')
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations'),
        dict(type='PackSegInputs'),
    ]
    loaders = _loaders(
        lambda split: dict(
            type='BaseSegDataset',
            data_root=str(root / 'data'),
            data_prefix=dict(img_path=f'images/{split}', seg_map_path=f'masks/{split}'),
            img_suffix='.png',
            metainfo=dict(classes=CLASSES, palette=[[0, 0, 0], [200, 0, 0]]),
            pipeline=pipeline,
        )
    )
    return _write(
        root / 'tiny_segmentor.py',
        default_scope='mmseg',
        model=segmentor_model(),
        **loaders,
        val_evaluator=dict(type='IoUMetric', iou_metrics=['mIoU']),
        test_evaluator=dict(type='IoUMetric', iou_metrics=['mIoU']),
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=2, val_interval=2),
        default_hooks=dict(
            checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=2),
            logger=dict(type='LoggerHook', interval=1, log_metric_by_epoch=False),
            visualization=dict(type='SegVisualizationHook', draw=False),
        ),
        log_processor=dict(by_epoch=False),
        visualizer=dict(
            type='SegLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')]
        ),
        tta_model=dict(type='SegTTAModel'),
        tta_pipeline=_flipped_twice(
            dict(type='LoadAnnotations'), dict(type='PackSegInputs')
        ),
    )


def _flipped_twice(*steps: dict) -> list[dict]:
    """A test-time augmentation that gives the same image twice."""
    flips = [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=0.0)]
    views = [flips, *([step] for step in steps)]
    return [dict(type='LoadImageFromFile'), dict(type='TestTimeAug', transforms=views)]


def _loaders(dataset) -> dict:
    def loader(split: str, shuffle: bool) -> dict:
        return dict(
            batch_size=4,
            num_workers=0,
            dataset=dataset(split),
            sampler=dict(type='DefaultSampler', shuffle=shuffle),
        )

    return dict(
        train_dataloader=loader('train', shuffle=True),
        val_dataloader=loader('val', shuffle=False),
        test_dataloader=loader('val', shuffle=False),
    )


def _write(path: Path, **entries) -> Path:
    Config(
        dict(
            optim_wrapper=dict(
                type='OptimWrapper', optimizer=dict(type='SGD', lr=0.05, momentum=0.9)
            ),
            val_cfg=dict(),
            test_cfg=dict(),
            randomness=dict(seed=0),
            # Distributed tests run on CPUs.
            env_cfg=dict(dist_cfg=dict(backend='gloo')),
            **entries,
        )
    ).dump(path)
    return path


def _draw(label: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 60, (HEIGHT, WIDTH, 3), np.uint8)
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    top, left = rng.integers(0, HEIGHT - 12), rng.integers(0, WIDTH - 8)
    window = np.s_[top : top + 12, left : left + 8]
    image[window] += np.uint8(60 + 120 * label)
    mask[window] = 1
    return image, mask


def _save(array: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
