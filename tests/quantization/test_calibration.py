"""The images that int8 is calibrated with."""

from functools import partial

import numpy as np
import pytest
from mmengine.config import Config
from tiny_projects import HEIGHT, WIDTH, write_classification, write_segmentation
from torch.utils.data import Dataset

from mmrep.deployment import build_model, enter_scope
from mmrep.errors import ConfigError
from mmrep.hosts import forward
from mmrep.quantization import HostEvaluation
from mmrep.quantization.calibration import (
    build_dataset,
    calibration_dataset,
    calibration_images,
)
from mmrep.quantization.progress import untracked
from mmrep.quantization.source import _preprocessed


def config_of(**dataloaders) -> Config:
    return Config({f'{name}_dataloader': d for name, d in dataloaders.items()})


def loader(**dataset) -> dict:
    return dict(batch_size=2, dataset=dataset)


VAL = loader(type='Images', part='val', pipeline=[dict(type='Resize', scale=32)])
PLAIN = dict(type='Images', part='train', pipeline=[dict(type='Resize', scale=32)])


def images_of(**more) -> dict:
    return dict(type='Images', part='train', pipeline=[dict(type='RandomFlip')], **more)


def test_training_set_with_the_test_pipeline():
    config = config_of(train=loader(**images_of()), val=VAL)
    before = config.to_dict()
    assert calibration_dataset(config) == PLAIN
    assert config.to_dict() == before
    # The validation set's pipeline first, the test set's where there is none.
    test = loader(type='Images', pipeline=[dict(type='Resize', scale=64)])
    config = config_of(train=loader(**images_of()), val=VAL, test=test)
    assert calibration_dataset(config).pipeline[0].scale == 32
    config = config_of(train=loader(**images_of()), test=test)
    assert calibration_dataset(config).pipeline[0].scale == 64


def test_data_sets_around_others():
    """They stay, but for those that make one image of several."""
    repeated = dict(type='Repeat', times=3, dataset=images_of())
    config = config_of(train=loader(**repeated), val=VAL)
    assert calibration_dataset(config) == dict(type='Repeat', times=3, dataset=PLAIN)
    folded = dict(type='KFold', fold=1, dataset=repeated)
    config = config_of(train=loader(**folded), val=VAL)
    expected = dict(type='Repeat', times=3, dataset=PLAIN)
    assert calibration_dataset(config) == dict(type='KFold', fold=1, dataset=expected)
    mosaic = dict(type='Mix', pipeline=[dict(type='Mosaic')], dataset=images_of())
    config = config_of(train=loader(**mosaic), val=VAL)
    assert calibration_dataset(config) == PLAIN
    both = dict(type='Concat', datasets=[images_of(a=1), images_of(a=2)])
    config = config_of(train=loader(**both), val=VAL)
    expected = [dict(PLAIN, a=1), dict(PLAIN, a=2)]
    assert calibration_dataset(config) == dict(type='Concat', datasets=expected)
    around = loader(type='Concat', datasets=[VAL['dataset'], VAL['dataset']])
    assert calibration_dataset(config_of(train=loader(**images_of()), val=around)) == PLAIN


@pytest.mark.parametrize(
    ('loaders', 'says'),
    [
        (dict(val=VAL), 'no train_dataloader.dataset'),
        (dict(train=None, val=VAL), 'no train_dataloader.dataset'),
        (dict(train=dict(batch_size=1), val=VAL), 'no train_dataloader.dataset'),
        (dict(train=loader(**images_of())), 'no pipeline in val_dataloader.dataset'),
        (
            dict(train=loader(**images_of()), val=loader(type='Images')),
            'no pipeline in val_dataloader.dataset',
        ),
    ],
)
def test_what_is_missing_is_one_sentence(loaders, says):
    with pytest.raises(ConfigError, match=says):
        calibration_dataset(config_of(**loaders))


@pytest.mark.parametrize('write', [write_classification, write_segmentation])
def test_images_as_the_network_gets_them(tmp_path, write):
    pytest.importorskip('mmpretrain' if write is write_classification else 'mmseg')
    if write is write_segmentation:
        pytest.importorskip('mmcv.ops')
    config = Config.fromfile(write(tmp_path))
    # What training does is not done: these would be black.
    config.train_dataloader.dataset.pipeline.insert(1, dict(type='NoSuchTransform'))
    enter_scope(config)
    model = build_model(config)
    dataset = build_dataset(calibration_dataset(config))
    inputs_of = HostEvaluation(config, model).inputs_of
    inputs_of = partial(inputs_of, infer=partial(forward, build_model(config)))
    images = calibration_images(dataset, inputs_of, 3, untracked)
    assert [image.shape for image in images] == [(1, 3, HEIGHT, WIDTH)] * 3
    for image in images:
        assert image.dtype == np.float32 and -2.2 < image.min() < image.max() < 2
    every = calibration_images(dataset, partial(_preprocessed, model), 100, untracked)
    assert len(every) == len(dataset) == (8 if write is write_classification else 4)
    assert all((a == b).all() for a, b in zip(images, every, strict=False))
    other = calibration_images(dataset, inputs_of, 3, untracked, seed=1)
    assert any((a != b).any() for a, b in zip(images, other, strict=True))


def test_an_empty_training_set_is_one_sentence():
    class Empty(Dataset):
        """Those of mmengine cannot even be built."""

        def __len__(self) -> int:
            return 0

    config = config_of(train=loader(type=Empty), val=VAL)
    dataset = calibration_dataset(config)
    with pytest.raises(ConfigError, match='the training set of this config is empty'):
        build_dataset(dict(type=dataset.type))
