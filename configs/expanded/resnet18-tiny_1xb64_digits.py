# mmpretrain's network, which the other two configs of the digits expand.
_base_ = '../dbb/dbb-resnet18-tiny_1xb64_digits.py'

model = dict(backbone=dict(type='ResNet'))
