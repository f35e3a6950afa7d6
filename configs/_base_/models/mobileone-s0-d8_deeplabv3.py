_base_ = 'segmentor.py'

model = dict(
    backbone=dict(
        type='mmrep.MobileOne',
        arch='s0',
        out_indices=(0, 1, 2, 3),
        # The stem's stride is 2. Every 3x3 conv of the last two stages is dilated.
        strides=(2, 2, 1, 1),
        dilations=(1, 1, 2, 4),
        norm_cfg=dict(type='SyncBN', requires_grad=True),
        init_cfg=dict(
            type='Pretrained',
            # mmpretrain's weights: the keys are the same.
            checkpoint='https://download.openmmlab.com/mmclassification/v0/mobileone/'
            'mobileone-s0_8xb32_in1k_20221110-0bc94952.pth',
            prefix='backbone.',
        ),
    ),
    decode_head=dict(type='ASPPHead', in_channels=1024, dilations=(1, 12, 24, 36)),
    auxiliary_head=dict(in_channels=256),
)
