_base_ = [
    '../_base_/models/repopt-vgg.py',
    '../_base_/datasets/imagenet_bs32.py',
    '../_base_/schedules/imagenet_bs256_120e.py',
    '../_base_/imagenet_runtime.py',
]

optim_wrapper = dict(
    constructor='mmrep.RepOptimizerConstructor',
    scales='work_dirs/repopt-vgg-b1-search_8xb16_cifar100/epoch_240.pth',
)
