_base_ = 'repvgg-a0-d8_deeplabv3plus_8xb2-40e_cityscapes-512x1024.py'

model = dict(
    backbone=dict(
        arch='B2',
        init_cfg=dict(
            checkpoint='https://download.openmmlab.com/mmclassification/v0/repvgg/'
            'repvgg-B2_8xb32_in1k_20221213-d8b420ef.pth',
        ),
    ),
    decode_head=dict(in_channels=2560, c1_in_channels=160),
    auxiliary_head=dict(in_channels=640),
)
