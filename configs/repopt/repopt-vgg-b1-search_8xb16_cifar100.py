_base_ = [
    '../_base_/datasets/cifar100_bs16.py',
    '../_base_/schedules/cifar_bs128_240e.py',
    '../_base_/imagenet_runtime.py',
]

model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='mmrep.RepOptVGG',
        arch='B1',
        out_indices=(3,),
        block_cfg=dict(type='mmrep.ScaleSumBlock'),
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=100,
        in_channels=2048,
        loss=dict(type='CrossEntropyLoss'),
    ),
)
default_hooks = dict(checkpoint=dict(interval=20))
