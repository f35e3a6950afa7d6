_base_ = 'dbb-r50-d8.py'

model = dict(
    # The head takes stages with output strides of 4, 8, 16 and 32.
    backbone=dict(strides=(1, 2, 2, 2), dilations=(1, 1, 1, 1)),
    decode_head=dict(
        type='UPerHead',
        in_channels=[256, 512, 1024, 2048],
        in_index=[0, 1, 2, 3],
    ),
)
