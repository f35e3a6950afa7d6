_base_ = '../dbb/dbb-resnet18_8xb32_in1k.py'

model = dict(
    backbone=dict(type='mmrep.ReparamResNet', block_cfg=dict(type='mmrep.OREPABlock')),
)
