model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='mmrep.RepVGG',
        arch=dict(
            num_blocks=[1, 2, 3, 1],
            width_factor=[0.25, 0.25, 0.25, 0.25],
            group_layer_map=None,
            se_cfg=None,
        ),
        # With the stem's stride of 2, the last stage reduces 32x32 pixels to 2x2.
        strides=(1, 2, 2, 2),
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=10,
        in_channels=128,
        loss=dict(type='CrossEntropyLoss'),
    ),
)
