model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='mmrep.RepLKNet',
        # With the stem's stride of 4, the last stage reduces 32x32 pixels to 4x4.
        arch=dict(
            large_kernel_sizes=(13, 7),
            layers=(2, 2),
            channels=(32, 64),
            small_kernel=3,
            dw_ratio=1,
        ),
        strides=(2, 2),
        dilations=(1, 1),
        out_indices=(1,),
        drop_path_rate=0,
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=10,
        in_channels=64,
        loss=dict(type='CrossEntropyLoss'),
    ),
)
