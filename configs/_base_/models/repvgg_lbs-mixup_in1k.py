_base_ = 'repvgg_in1k.py'

model = dict(
    head=dict(
        loss=dict(
            _delete_=True,
            type='LabelSmoothLoss',
            label_smooth_val=0.1,
            num_classes=1000,
        )
    ),
    train_cfg=dict(augments=dict(type='Mixup', alpha=0.2)),
)
