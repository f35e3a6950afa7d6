_base_ = 'adamw_bs4096_300e.py'

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, end=10, convert_to_iter_based=True),
    dict(
        type='CosineAnnealingLR',
        T_max=290,
        begin=10,
        eta_min=1e-6,
        convert_to_iter_based=True,
    ),
]

custom_hooks = [
    dict(type='EMAHook', momentum=1e-4, update_buffers=True, priority='ABOVE_NORMAL')
]

auto_scale_lr = dict(base_batch_size=2048)
