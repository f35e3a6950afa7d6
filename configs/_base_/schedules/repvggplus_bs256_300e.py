_base_ = 'imagenet_bs256_120e.py'

# Of the one-dimensional parameters, only the weights of the identity branches' norms are
# decayed.
optim_wrapper = dict(
    optimizer=dict(weight_decay=4e-5, nesterov=True),
    paramwise_cfg=dict(
        flat_decay_mult=0.0,
        custom_keys={'branch_norm.weight': dict(decay_mult=1.0)},
    ),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-4, end=5, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', T_max=295, begin=5, convert_to_iter_based=True),
]

train_cfg = dict(max_epochs=300)
