_base_ = [
    '../_base_/models/repvgg_in1k.py',
    '../_base_/datasets/imagenet_bs32.py',
    '../_base_/schedules/imagenet_bs256_120e.py',
    '../_base_/imagenet_runtime.py',
]

# Four kxk branches, as in MobileOne-S0.
model = dict(backbone=dict(block_cfg=dict(type='mmrep.MobileOneBlock', num_convs=4)))
