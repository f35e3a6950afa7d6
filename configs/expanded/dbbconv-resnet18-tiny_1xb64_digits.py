_base_ = 'resnet18-tiny_1xb64_digits.py'

model = dict(backbone=dict(conv_cfg=dict(type='mmrep.DBBConv2d')))
