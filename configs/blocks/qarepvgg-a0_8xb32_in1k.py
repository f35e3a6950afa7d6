_base_ = [
    '../_base_/models/repvgg_in1k.py',
    '../_base_/datasets/imagenet_bs32.py',
    '../_base_/schedules/imagenet_bs256_120e.py',
    '../_base_/imagenet_runtime.py',
]

model = dict(backbone=dict(block_cfg=dict(type='mmrep.QARepVGGBlock')))
