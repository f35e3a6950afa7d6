# The segmentors start from the weights of this backbone.
_base_ = 'dbb-resnet50_8xb32_in1k.py'

model = dict(backbone=dict(type='mmrep.DBBResNetV1c'))
