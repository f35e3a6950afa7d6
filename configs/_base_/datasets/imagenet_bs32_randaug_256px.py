# Trained with 256x256 pixels and RandAugment of magnitude 15, tested with 320x320.
_base_ = 'imagenet_bs32.py'

# With prob=1.0 a policy is applied whenever it is drawn. Level 10 is the end of its
# magnitude_range; levels up to 15 go beyond.
policies = [
    dict(type='AutoContrast', prob=1.0),
    dict(type='Equalize', prob=1.0),
    dict(type='Invert', prob=1.0),
    dict(type='Rotate', magnitude_range=(0, 30), prob=1.0),
    dict(type='Posterize', magnitude_range=(0, 4), prob=1.0),
    dict(type='Solarize', magnitude_range=(0, 256), prob=1.0),
    dict(type='SolarizeAdd', magnitude_range=(0, 110), prob=1.0),
    # The factor is 1 plus the magnitude: from 0.1 to 1.9.
    dict(
        type='ColorTransform',
        magnitude_range=(-0.9, 0.9),
        random_negative_prob=0.0,
        prob=1.0,
    ),
    dict(
        type='Contrast',
        magnitude_range=(-0.9, 0.9),
        random_negative_prob=0.0,
        prob=1.0,
    ),
    dict(
        type='Brightness',
        magnitude_range=(-0.9, 0.9),
        random_negative_prob=0.0,
        prob=1.0,
    ),
    dict(
        type='Sharpness',
        magnitude_range=(-0.9, 0.9),
        random_negative_prob=0.0,
        prob=1.0,
    ),
    dict(type='Shear', magnitude_range=(0, 0.3), direction='horizontal', prob=1.0),
    dict(type='Shear', magnitude_range=(0, 0.3), direction='vertical', prob=1.0),
    dict(type='Translate', magnitude_range=(0, 0.45), direction='horizontal', prob=1.0),
    dict(type='Translate', magnitude_range=(0, 0.45), direction='vertical', prob=1.0),
    dict(type='Cutout', magnitude_range=(0, 40), prob=1.0),
]

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=256, backend='pillow'),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(
        type='RandAugment',
        policies=policies,
        num_policies=2,
        magnitude_level=15,
        # Uniform from 0 to the level.
        magnitude_std='inf',
        hparams=dict(pad_val=128, interpolation='bicubic'),
    ),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='ResizeEdge', scale=320, edge='short', backend='pillow'),
    dict(type='CenterCrop', crop_size=320),
    dict(type='PackInputs'),
]

train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
