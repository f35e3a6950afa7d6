_base_ = 'imagenet_bs256_120e.py'

optim_wrapper = dict(paramwise_cfg=dict(norm_decay_mult=0.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, end=5, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', T_max=295, begin=5, convert_to_iter_based=True),
    # The weight decay falls to a tenth. eta_min, the same for all parameters, would raise
    # that of the norms from 0.
    dict(
        type='CosineAnnealingParamScheduler',
        param_name='weight_decay',
        eta_min_ratio=0.1,
        T_max=300,
        convert_to_iter_based=True,
    ),
]

train_cfg = dict(max_epochs=300)

custom_hooks = [
    dict(type='EMAHook', momentum=5e-4, update_buffers=True, priority='ABOVE_NORMAL')
]
