# The digits' network, for images with one channel, trained for a third of the epochs.
_base_ = [
    '../_base_/models/unireplknet-tiny.py',
    '../_base_/datasets/fashion-mnist_bs64.py',
    '../_base_/schedules/digits_adamw_bs64_15e.py',
    '../_base_/mmpretrain_runtime.py',
]

model = dict(backbone=dict(in_channels=1))
param_scheduler = dict(T_max=5)
train_cfg = dict(max_epochs=5)
