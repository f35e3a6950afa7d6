_base_ = 'mmseg::upernet/upernet_r50_4xb2-80k_cityscapes-512x1024.py'

model = dict(
    type='mmrep.Expanded',
    # The head alone: the backbone starts with public weights, and would with blocks, too.
    expand=dict(
        of='EncoderDecoder',
        block=dict(type='mmrep.DiverseBranchBlock'),
        include='decode_head.*',
    ),
)
