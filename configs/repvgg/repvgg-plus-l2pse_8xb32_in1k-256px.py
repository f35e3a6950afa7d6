_base_ = [
    '../_base_/models/repvggplus_in1k.py',
    '../_base_/datasets/imagenet_bs32_randaug_256px.py',
    '../_base_/schedules/repvggplus_bs256_300e.py',
    '../_base_/imagenet_runtime.py',
]
