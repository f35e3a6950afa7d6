model = dict(
    type='ImageClassifier',
    # It averages its outputs over the pixels, so that the head needs no neck.
    backbone=dict(type='mmrep.UniRepLKNet', arch='A'),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=320,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
        topk=(1, 5),
    ),
    train_cfg=dict(
        augments=[dict(type='Mixup', alpha=0.3), dict(type='CutMix', alpha=0.3)]
    ),
)
