_base_ = 'segmentation_bs16_80k.py'

optim_wrapper = dict(optimizer=dict(weight_decay=1e-4))
param_scheduler = [dict(type='PolyLR', eta_min=0.0, power=0.9, end=80000, by_epoch=False)]
