_base_ = 'unireplknet-t_upernet_4xb4-160k_ade20k-512x512.py'

channels = [96, 192, 384, 768]
model = dict(
    backbone=dict(
        arch='S',
        drop_path_rate=0.3,
        init_cfg=dict(checkpoint='checkpoints/unireplknet-s_in1k.pth'),
    ),
    decode_head=dict(in_channels=channels),
    auxiliary_head=dict(in_channels=channels[2]),
)
