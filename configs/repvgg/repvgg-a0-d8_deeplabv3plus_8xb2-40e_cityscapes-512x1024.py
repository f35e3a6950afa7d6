_base_ = [
    '../_base_/models/repvgg-a0-d8_deeplabv3plus.py',
    '../_base_/datasets/cityscapes_512x1024.py',
    '../_base_/schedules/repvgg_cityscapes_bs16_40e.py',
    '../_base_/segmentation_runtime.py',
]
