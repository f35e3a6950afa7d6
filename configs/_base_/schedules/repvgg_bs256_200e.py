_base_ = 'repvgg_bs256_120e.py'

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-4, end=5, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', T_max=195, begin=5, convert_to_iter_based=True),
]

train_cfg = dict(max_epochs=200)
