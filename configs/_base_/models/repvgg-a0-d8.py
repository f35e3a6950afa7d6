_base_ = 'segmentor.py'

model = dict(
    backbone=dict(
        type='mmrep.RepVGG',
        arch='A0',
        out_indices=(0, 1, 2, 3),
        # The stem's stride is 2. Every 3x3 conv of the last two stages is dilated.
        strides=(2, 2, 1, 1),
        dilations=(1, 1, 2, 4),
        norm_cfg=dict(type='SyncBN', requires_grad=True),
        init_cfg=dict(
            type='Pretrained',
            # mmpretrain's weights: the keys are the same.
            checkpoint='https://download.openmmlab.com/mmclassification/v0/repvgg/'
            'repvgg-A0_8xb32_in1k_20221213-60ae8e23.pth',
            prefix='backbone.',
        ),
    ),
    decode_head=dict(in_channels=1280),
    auxiliary_head=dict(in_channels=192),
)
