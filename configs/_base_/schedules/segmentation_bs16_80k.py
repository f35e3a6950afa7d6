_base_ = 'segmentation_bs8_80k.py'

auto_scale_lr = dict(base_batch_size=16)
