model = dict(
    type='ImageClassifier',
    backbone=dict(type='mmrep.DBBMobileNetV1'),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=1024,
        loss=dict(type='CrossEntropyLoss'),
        topk=(1, 5),
    ),
)
