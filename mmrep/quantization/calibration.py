"""The images that an int8 model is calibrated with."""

import copy
from collections.abc import Callable

import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.dataset import BaseDataset, pseudo_collate
from mmengine.runner import Runner

from mmrep.errors import ConfigError

from .progress import Track


def calibration_dataset(config: Config) -> ConfigDict:
    """The config of the training set, whose images go through the test pipeline.

    A data set that mixes several images, as mosaics do, is replaced by the one inside it.

    Raises:
        ConfigError: If the config has no training set or no pipeline to test with.
    """
    train = _dataset(config, 'train_dataloader')
    if train is None:
        raise ConfigError(
            'this config has no train_dataloader.dataset, whose images int8 is calibrated '
            'with: give the config that the checkpoint was trained with'
        )
    pipeline = None
    for name in ('val_dataloader', 'test_dataloader'):
        if pipeline is None:
            pipeline = _pipeline(_dataset(config, name))
    if pipeline is None:
        raise ConfigError(
            'this config has no pipeline in val_dataloader.dataset or '
            'test_dataloader.dataset: give a config with one'
        )
    return _with_pipeline(copy.deepcopy(train), pipeline)


def calibration_images(
    dataset: BaseDataset,
    inputs_of: Callable[[dict], list[np.ndarray]],
    samples: int,
    track: Track,
    seed: int = 0,
) -> list[np.ndarray]:
    """Random images of a data set as the network gets them, ``(1, C, H, W)`` each.

    Args:
        dataset: The data set, as :func:`calibration_dataset` describes it.
        inputs_of: Function from a batch of one image to the inputs of the network: the
            image, or its crops, of which a random one is taken.
        samples: The largest number of images.
        track: Wraps the images, with a title, to show progress.
        seed: Seed of the choice. Default: 0.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(dataset), generator=generator)
    images = []
    for index in track(order[:samples].tolist(), 'reading calibration images'):
        inputs = inputs_of(pseudo_collate([dataset[index]]))
        images.append(inputs[torch.randint(len(inputs), (), generator=generator)])
    return images


def build_dataset(config: ConfigDict) -> BaseDataset:
    """Build the data set of a config.

    Raises:
        ConfigError: If it is empty.
    """
    # Built as a Runner does; the sampler and the workers are not used.
    dataset = Runner.build_dataloader(
        dict(
            dataset=config,
            batch_size=1,
            num_workers=0,
            sampler=dict(type='DefaultSampler', shuffle=False),
        )
    ).dataset
    if not len(dataset):
        raise ConfigError(
            'the training set of this config is empty: int8 is calibrated with its images'
        )
    return dataset


def _dataset(config: Config, loader: str) -> ConfigDict | None:
    """The data set of a data loader."""
    node = config.get(loader)
    dataset = node.get('dataset') if isinstance(node, dict) else None
    return dataset if isinstance(dataset, dict) else None


def _pipeline(dataset: ConfigDict | None) -> list | None:
    """The pipeline of a data set, or of the first one inside it."""
    while dataset is not None and 'pipeline' not in dataset:
        inner = dataset.get('dataset') or next(iter(dataset.get('datasets') or ()), None)
        dataset = inner if isinstance(inner, dict) else None
    return dataset['pipeline'] if dataset is not None else None


def _with_pipeline(dataset: ConfigDict, pipeline: list) -> ConfigDict:
    """The same data set with another pipeline; changed in place if possible."""
    if isinstance(dataset.get('dataset'), dict):
        inner = _with_pipeline(dataset.dataset, pipeline)
        if 'pipeline' in dataset:
            return inner
        dataset.dataset = inner
    elif isinstance(dataset.get('datasets'), list | tuple):
        dataset.datasets = [_with_pipeline(inner, pipeline) for inner in dataset.datasets]
    elif 'pipeline' in dataset:
        # test_mode is left alone, since some data sets choose by it what they read.
        dataset.pipeline = copy.deepcopy(pipeline)
    return dataset
