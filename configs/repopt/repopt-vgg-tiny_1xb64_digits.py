_base_ = '../repvgg/repvgg-tiny_1xb64_digits.py'

scales = 'work_dirs/repopt-vgg-tiny-search_1xb64_digits/epoch_15.pth'
model = dict(
    backbone=dict(
        type='mmrep.RepOptVGG',
        init_cfg=[
            dict(type='Kaiming', layer='Conv2d'),
            dict(type='Constant', val=1, layer='_BatchNorm'),
            dict(type='mmrep.SearchedScales', scales=scales),
        ],
    )
)
optim_wrapper = dict(constructor='mmrep.RepOptimizerConstructor', scales=scales)
