_base_ = 'dbb-r50_upernet_4xb2-80k_cityscapes-512x1024.py'

model = dict(
    backbone=dict(depth=18),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
