_base_ = '../repvgg/repvgg-tiny_1xb64_fashion-mnist.py'

model = dict(
    backbone=dict(block_cfg=dict(type='mmrep.OREPARepVGGBlock')),
)
