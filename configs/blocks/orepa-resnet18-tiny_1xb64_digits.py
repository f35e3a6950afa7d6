_base_ = '../dbb/dbb-resnet18-tiny_1xb64_digits.py'

model = dict(
    backbone=dict(type='mmrep.ReparamResNet', block_cfg=dict(type='mmrep.OREPABlock')),
)
