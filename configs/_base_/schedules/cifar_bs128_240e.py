_base_ = 'cifar_bs128_400e.py'

param_scheduler = [dict(type='CosineAnnealingLR', T_max=240, convert_to_iter_based=True)]

train_cfg = dict(max_epochs=240)
