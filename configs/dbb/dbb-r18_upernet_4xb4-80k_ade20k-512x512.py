_base_ = 'dbb-r50_upernet_4xb4-80k_ade20k-512x512.py'

model = dict(
    backbone=dict(depth=18),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
