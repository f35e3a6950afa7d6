_base_ = 'repvgg-a0-d8_deeplabv3plus_8xb2-40e_cityscapes-512x1024.py'

model = dict(
    backbone=dict(
        arch='B1g2',
        init_cfg=dict(
            checkpoint='https://download.openmmlab.com/mmclassification/v0/repvgg/'
            'repvgg-B1g2_8xb32_in1k_20221213-ae6428fd.pth',
        ),
    ),
    decode_head=dict(in_channels=2048, c1_in_channels=128),
    auxiliary_head=dict(in_channels=512),
)
