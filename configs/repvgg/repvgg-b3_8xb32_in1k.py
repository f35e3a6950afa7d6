_base_ = [
    '../_base_/models/repvgg_lbs-mixup_in1k.py',
    '../_base_/datasets/imagenet_bs32_autoaug.py',
    '../_base_/schedules/repvgg_bs256_200e.py',
    '../_base_/imagenet_runtime.py',
]

model = dict(backbone=dict(arch='B3'), head=dict(in_channels=2560))
