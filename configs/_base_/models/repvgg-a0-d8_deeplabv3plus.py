_base_ = 'repvgg-a0-d8.py'

model = dict(
    decode_head=dict(
        type='DepthwiseSeparableASPPHead',
        dilations=(1, 12, 24, 36),
        c1_in_channels=48,
        c1_channels=48,
    )
)
