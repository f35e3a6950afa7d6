_base_ = [
    '../_base_/models/mobileone_in1k.py',
    '../_base_/datasets/imagenet_bs32.py',
    '../_base_/schedules/mobileone_bs256_300e.py',
    '../_base_/imagenet_runtime.py',
]
