model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='mmrep.DBBResNet',
        depth=18,
        out_indices=(3,),
        zero_init_residual=False,
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=512,
        loss=dict(type='CrossEntropyLoss'),
        topk=(1, 5),
    ),
)
