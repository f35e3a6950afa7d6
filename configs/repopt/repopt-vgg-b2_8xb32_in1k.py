_base_ = 'repopt-vgg-b1_8xb32_in1k.py'

scales = 'work_dirs/repopt-vgg-b2-search_8xb16_cifar100/epoch_240.pth'
model = dict(
    backbone=dict(
        arch='B2',
        init_cfg=[
            dict(type='Kaiming', layer='Conv2d'),
            dict(type='Constant', val=1, layer='_BatchNorm'),
            dict(type='mmrep.SearchedScales', scales=scales),
        ],
    ),
    head=dict(in_channels=2560),
)
optim_wrapper = dict(scales=scales)
