_base_ = [
    '../_base_/models/fcn_digits.py',
    '../_base_/datasets/digits_64x64.py',
    '../_base_/schedules/digits_1k.py',
    '../_base_/mmseg_runtime.py',
]

model = dict(
    backbone=dict(
        type='mmrep.DBBResNet',
        depth=18,
        stem_channels=16,
        base_channels=16,
        # With the stem's stride of 4, the output strides of the stages are 4, 8, 8 and 8.
        strides=(1, 2, 1, 1),
        dilations=(1, 1, 1, 1),
        out_indices=(0, 1, 2, 3),
    ),
    decode_head=dict(in_channels=[16, 32, 64, 128]),
)
