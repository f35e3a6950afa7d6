_base_ = 'segmentor.py'

channels = [80, 160, 320, 640]
model = dict(
    backbone=dict(
        type='mmrep.UniRepLKNet',
        arch='T',
        out_indices=(0, 1, 2, 3),
        gap_before_final_norm=False,
        drop_path_rate=0.2,
        norm_cfg=dict(type='SyncBN', requires_grad=True),
        init_cfg=dict(
            type='Pretrained',
            # tools/convert_checkpoint.py makes this file from the official weights.
            checkpoint='checkpoints/unireplknet-t_in1k.pth',
            prefix='backbone.',
        ),
    ),
    decode_head=dict(type='UPerHead', in_channels=channels, in_index=[0, 1, 2, 3]),
    auxiliary_head=dict(in_channels=channels[2]),
)
