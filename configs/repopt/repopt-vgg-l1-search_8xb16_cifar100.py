_base_ = 'repopt-vgg-b1-search_8xb16_cifar100.py'

model = dict(backbone=dict(arch='L1'), head=dict(in_channels=2048))
