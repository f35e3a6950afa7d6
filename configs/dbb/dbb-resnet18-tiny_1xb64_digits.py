_base_ = [
    '../_base_/datasets/digits_bs64.py',
    '../_base_/schedules/digits_bs64_15e.py',
    '../_base_/mmpretrain_runtime.py',
]

model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='mmrep.DBBResNet',
        depth=18,
        stem_channels=16,
        base_channels=16,
        # The stem reduces 32x32 pixels to 8x8, the stages to 2x2.
        strides=(1, 2, 2, 1),
        out_indices=(3,),
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=10,
        in_channels=128,
        loss=dict(type='CrossEntropyLoss'),
    ),
)
