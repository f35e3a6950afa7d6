_base_ = 'imagenet_bs32.py'

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=224, backend='pillow'),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    # The hue of mmpretrain's ColorJitter raises OverflowError on numpy 2.
    dict(type='NumpyToPIL', to_rgb=True),
    dict(type='torchvision/ColorJitter', brightness=0.4, saturation=0.4, hue=0.4),
    # In uint8, values that Lighting moves below 0 or above 255 would wrap around.
    dict(type='PILToNumpy', to_bgr=True, dtype='float32'),
    dict(
        type='Lighting',
        # The principal components of ImageNet's colours; the rows are B, G, R.
        eigval=[55.4625, 4.7940, 1.1475],
        eigvec=[
            [-0.5836, -0.6948, 0.4203],
            [-0.5808, -0.0045, -0.8140],
            [-0.5675, 0.7192, 0.4009],
        ],
        alphastd=0.1,
    ),
    dict(type='PackInputs'),
]

train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
