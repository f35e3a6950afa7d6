_base_ = 'repvgg_segmentation_bs16_80k.py'

# 40 epochs of 2975 images in batches of 16.
param_scheduler = [dict(type='PolyLR', eta_min=0.0, power=0.9, end=7440, by_epoch=False)]

train_cfg = dict(max_iters=7440, val_interval=1860)
