_base_ = [
    '../_base_/models/unireplknet_in1k.py',
    '../_base_/datasets/imagenet_bs128_randaug.py',
    '../_base_/schedules/adamw_bs4096_300e.py',
    '../_base_/imagenet_runtime.py',
]
