# A plain network, initialized with the scales that a search found.
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='mmrep.RepOptVGG',
        arch='B1',
        out_indices=(3,),
        init_cfg=[
            dict(type='Kaiming', layer='Conv2d'),
            dict(type='Constant', val=1, layer='_BatchNorm'),
            dict(
                type='mmrep.SearchedScales',
                scales='work_dirs/repopt-vgg-b1-search_8xb16_cifar100/epoch_240.pth',
            ),
        ],
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=2048,
        loss=dict(type='CrossEntropyLoss'),
        topk=(1, 5),
    ),
)
