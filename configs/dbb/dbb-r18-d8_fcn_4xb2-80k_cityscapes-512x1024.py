_base_ = 'dbb-r50-d8_fcn_4xb2-80k_cityscapes-512x1024.py'

model = dict(
    backbone=dict(depth=18),
    decode_head=dict(in_channels=512, channels=128),
    auxiliary_head=dict(in_channels=256, channels=64),
)
