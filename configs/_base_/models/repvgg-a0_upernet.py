_base_ = 'repvgg-a0-d8.py'

model = dict(
    # The head takes stages with output strides of 4, 8, 16 and 32.
    backbone=dict(strides=(2, 2, 2, 2), dilations=(1, 1, 1, 1)),
    decode_head=dict(
        type='UPerHead',
        in_channels=[48, 96, 192, 1280],
        in_index=[0, 1, 2, 3],
    ),
)
