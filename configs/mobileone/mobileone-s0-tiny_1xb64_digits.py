_base_ = '../repvgg/repvgg-tiny_1xb64_digits.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmrep.MobileOne',
        arch=dict(
            num_blocks=[1, 2, 3, 1],
            width_factor=[1, 1, 1, 0.5],
            num_conv_branches=[4, 4, 4, 4],
            num_se_blocks=[0, 0, 0, 0],
        ),
        # With the stem's stride of 2, the last stage reduces 32x32 pixels to 2x2.
        strides=(1, 2, 2, 2),
    ),
    head=dict(in_channels=256),
)
