_base_ = 'imagenet_bs256_120e.py'

# No weight decay for biases and for the norms of the conv branches. The weight of the
# identity branch's norm is decayed.
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={
            '.bias': dict(decay_mult=0.0),
            'branch_3x3.norm': dict(decay_mult=0.0),
            'branch_1x1.norm': dict(decay_mult=0.0),
        }
    )
)
