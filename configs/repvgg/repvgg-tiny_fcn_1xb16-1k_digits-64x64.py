_base_ = [
    '../_base_/models/fcn_digits.py',
    '../_base_/datasets/digits_64x64.py',
    '../_base_/schedules/digits_1k.py',
    '../_base_/mmseg_runtime.py',
]

model = dict(
    backbone=dict(
        type='mmrep.RepVGG',
        arch=dict(
            num_blocks=[1, 2, 3, 1],
            width_factor=[0.25, 0.25, 0.25, 0.125],
            group_layer_map=None,
            se_cfg=None,
        ),
        out_indices=(0, 1, 2, 3),
        # With the stem's stride of 2, the output strides of the stages are 2, 4, 8 and 8.
        strides=(1, 2, 2, 1),
    ),
    decode_head=dict(in_channels=[16, 32, 64, 64]),
)
