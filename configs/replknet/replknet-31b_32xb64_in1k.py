_base_ = [
    '../_base_/datasets/imagenet_bs64_randaug.py',
    '../_base_/schedules/replknet_bs2048_300e.py',
    '../_base_/imagenet_runtime.py',
]

model = dict(
    type='ImageClassifier',
    backbone=dict(type='mmrep.RepLKNet', arch='31B', drop_path_rate=0.5),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=1024,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
        topk=(1, 5),
    ),
    train_cfg=dict(
        augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]
    ),
)
