# Images get larger and RandAugment stronger in the course of training; SwitchRecipeHook
# switches to the second and the third pipeline.
_base_ = 'imagenet_bs32.py'

# First epoch, image size and magnitude of each pipeline.
curriculum = [(1, 160, 2.1), (37, 192, 4.9), (112, 224, 7)]
pipelines = [
    [
        dict(type='LoadImageFromFile'),
        dict(type='RandomResizedCrop', scale=size, backend='pillow'),
        dict(type='RandomFlip', prob=0.5, direction='horizontal'),
        dict(
            type='RandAugment',
            policies='timm_increasing',
            num_policies=2,
            total_level=10,
            magnitude_level=magnitude,
            magnitude_std=0.5,
            # The mean of the data set, in the order of the loaded channels: BGR.
            hparams=dict(pad_val=[104, 116, 124]),
        ),
        dict(type='PackInputs'),
    ]
    for _, size, magnitude in curriculum
]
recipes = [
    dict(action_epoch=epoch, train_pipeline=pipeline)
    for (epoch, *_), pipeline in zip(curriculum[1:], pipelines[1:], strict=True)
]

train_dataloader = dict(dataset=dict(pipeline=pipelines[0]))
