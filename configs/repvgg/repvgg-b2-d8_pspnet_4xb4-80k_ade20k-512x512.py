_base_ = 'repvgg-a0-d8_pspnet_4xb4-80k_ade20k-512x512.py'

model = dict(
    backbone=dict(
        arch='B2',
        init_cfg=dict(
            checkpoint='https://download.openmmlab.com/mmclassification/v0/repvgg/'
            'repvgg-B2_8xb32_in1k_20221213-d8b420ef.pth',
        ),
    ),
    decode_head=dict(in_channels=2560),
    auxiliary_head=dict(in_channels=640),
)
