model = dict(
    type='ImageClassifier',
    backbone=dict(type='mmrep.DBBAlexNet', flatten=True),
    head=dict(
        type='StackedLinearClsHead',
        num_classes=1000,
        # 256 channels of 6x6 pixels, for images of 224x224.
        in_channels=9216,
        mid_channels=[4096, 4096],
        dropout_rate=0.5,
        loss=dict(type='CrossEntropyLoss'),
        topk=(1, 5),
    ),
)
