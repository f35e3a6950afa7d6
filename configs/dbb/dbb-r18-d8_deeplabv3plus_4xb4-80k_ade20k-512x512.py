_base_ = 'dbb-r50-d8_deeplabv3plus_4xb4-80k_ade20k-512x512.py'

model = dict(
    backbone=dict(depth=18),
    decode_head=dict(in_channels=512, channels=128, c1_in_channels=64, c1_channels=12),
    auxiliary_head=dict(in_channels=256, channels=64),
)
