_base_ = 'mmseg::deeplabv3plus/deeplabv3plus_r50-d8_4xb2-80k_cityscapes-512x1024.py'

model = dict(
    type='mmrep.Expanded',
    # Only the head is expanded. The backbone starts from public weights, which it could
    # load with blocks, too.
    expand=dict(
        of='EncoderDecoder',
        block=dict(type='mmrep.DiverseBranchBlock'),
        include='decode_head.*',
    ),
)
