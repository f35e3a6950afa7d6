_base_ = 'segmentor.py'

model = dict(
    backbone=dict(
        type='mmrep.DBBResNetV1c',
        depth=50,
        out_indices=(0, 1, 2, 3),
        strides=(1, 2, 1, 1),
        dilations=(1, 1, 2, 4),
        contract_dilation=True,
        norm_cfg=dict(type='SyncBN', requires_grad=True),
    ),
    decode_head=dict(in_channels=2048),
    auxiliary_head=dict(in_channels=1024),
)
