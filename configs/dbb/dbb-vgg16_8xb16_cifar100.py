_base_ = [
    '../_base_/models/dbb-vgg16_cifar.py',
    '../_base_/datasets/cifar100_bs16.py',
    '../_base_/schedules/cifar_bs128_400e.py',
    '../_base_/imagenet_runtime.py',
]

model = dict(head=dict(num_classes=100))
default_hooks = dict(checkpoint=dict(interval=20))
