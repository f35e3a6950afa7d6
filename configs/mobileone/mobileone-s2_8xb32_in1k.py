_base_ = [
    '../_base_/models/mobileone_in1k.py',
    '../_base_/datasets/imagenet_bs32_progressive.py',
    '../_base_/schedules/mobileone_bs256_300e.py',
    '../_base_/imagenet_runtime.py',
]

model = dict(backbone=dict(arch='s2'), head=dict(in_channels=2048))
custom_hooks = [
    *_base_.custom_hooks,
    dict(type='SwitchRecipeHook', schedule=_base_.recipes),
]
