loss = dict(type='LabelSmoothLoss', label_smooth_val=0.1, num_classes=1000)
aux_loss = dict(loss, loss_weight=0.1)

model = dict(
    type='ImageClassifier',
    # The auxiliary classifiers follow the first two stages and the first half of the
    # third.
    backbone=dict(type='mmrep.RepVGG', arch='plus-L2pse', out_indices=(0, 1, 2, 4)),
    head=dict(
        type='mmrep.AuxiliaryClsHead',
        head=dict(
            type='LinearClsHead',
            num_classes=1000,
            in_channels=2560,
            loss=loss,
            topk=(1, 5),
        ),
        auxiliary_heads=[
            dict(
                type='LinearClsHead',
                num_classes=1000,
                in_channels=in_channels,
                loss=aux_loss,
            )
            for in_channels in (160, 320, 640)
        ],
    ),
    train_cfg=dict(augments=dict(type='Mixup', alpha=0.2)),
)
