_base_ = [
    '../_base_/models/unireplknet-t_upernet.py',
    '../_base_/datasets/ade20k_512x512.py',
    '../_base_/schedules/unireplknet_segmentation_bs16_160k.py',
    '../_base_/segmentation_runtime.py',
]

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    decode_head=dict(num_classes=150),
    auxiliary_head=dict(num_classes=150),
)
