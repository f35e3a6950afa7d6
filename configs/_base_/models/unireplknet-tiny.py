model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='mmrep.UniRepLKNet',
        # With the stem's stride of 4, the last stage reduces 32x32 pixels to 4x4.
        arch=dict(channels=(32, 64), kernel_sizes=((7, 7), (7, 3, 7))),
        out_indices=(1,),
    ),
    head=dict(
        type='LinearClsHead',
        num_classes=10,
        in_channels=64,
        loss=dict(type='CrossEntropyLoss'),
    ),
)
