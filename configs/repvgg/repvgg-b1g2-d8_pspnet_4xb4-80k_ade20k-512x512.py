_base_ = 'repvgg-a0-d8_pspnet_4xb4-80k_ade20k-512x512.py'

model = dict(
    backbone=dict(
        arch='B1g2',
        init_cfg=dict(
            checkpoint='https://download.openmmlab.com/mmclassification/v0/repvgg/'
            'repvgg-B1g2_8xb32_in1k_20221213-ae6428fd.pth',
        ),
    ),
    decode_head=dict(in_channels=2048),
    auxiliary_head=dict(in_channels=512),
)
