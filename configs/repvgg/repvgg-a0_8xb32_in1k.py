_base_ = [
    '../_base_/models/repvgg_in1k.py',
    '../_base_/datasets/imagenet_bs32.py',
    '../_base_/schedules/repvgg_bs256_120e.py',
    '../_base_/imagenet_runtime.py',
]
