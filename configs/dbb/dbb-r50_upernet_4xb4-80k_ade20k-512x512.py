_base_ = [
    '../_base_/models/dbb-r50_upernet.py',
    '../_base_/datasets/ade20k_512x512.py',
    '../_base_/schedules/segmentation_bs16_80k.py',
    '../_base_/segmentation_runtime.py',
]

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    decode_head=dict(num_classes=150),
    auxiliary_head=dict(num_classes=150),
)
