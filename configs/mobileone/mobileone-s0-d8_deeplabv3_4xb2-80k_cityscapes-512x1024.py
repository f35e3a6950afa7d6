_base_ = [
    '../_base_/models/mobileone-s0-d8_deeplabv3.py',
    '../_base_/datasets/cityscapes_512x1024.py',
    '../_base_/schedules/segmentation_bs8_80k.py',
    '../_base_/segmentation_runtime.py',
]
