_base_ = 'dbb-r50-d8_pspnet_4xb4-80k_ade20k-512x512.py'

model = dict(
    backbone=dict(depth=18),
    decode_head=dict(in_channels=512, channels=128),
    auxiliary_head=dict(in_channels=256, channels=64),
)
