"""The classification heads that go with imported weights."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mmrep.registry import MODELS

#: Shapes by key.
Shapes = Mapping[str, Sequence[int]]

#: A size at which every map of a backbone still has a pixel.
_SIZE = 64

#: The weight of RepVGGplus' auxiliary losses, in the official code.
_AUX_WEIGHT = 0.1


@torch.no_grad()
def feature_channels(config: dict) -> list[int]:
    """The channels of a backbone's outputs; nothing is computed."""
    with torch.device('meta'):
        model = MODELS.build({**config, 'deploy': False}).eval()
        x = torch.zeros(1, config.get('in_channels', 3), _SIZE, _SIZE)
    return [feature.shape[1] for feature in model(x)]


def count_auxiliary(state: Mapping[str, Tensor]) -> int:
    """The number of auxiliary classifiers."""
    numbers = {key.split('.')[2] for key in state if key.startswith('head.aux_')}
    return 1 + max(map(int, numbers), default=-1)


def describe_head(
    state: Mapping[str, Tensor], channels: Sequence[int], deploy: bool
) -> tuple[dict | None, Shapes]:
    """The config of the head of a checkpoint, and the shapes of its weights.

    Args:
        state: The weights, with ``head.`` before those of the head.
        channels: Channels of the backbone's outputs.
        deploy: Whether the backbone is in deploy form.

    Returns:
        The config is that of mmpretrain's ``LinearClsHead``, or of ``AuxiliaryClsHead``
        with such heads; ``None`` where there is no head.
    """
    main = next((p for p in ('head', 'head.head') if f'{p}.fc.weight' in state), None)
    if main is None:
        return None, {}
    num_classes = len(state[f'{main}.fc.weight'])
    *others, last = channels
    config = _linear(num_classes, last)
    shapes = _fc_shapes(f'{main}.fc', num_classes, last)
    if main == 'head':
        return config, shapes
    auxiliary = []
    for i, width in enumerate(others):
        loss = dict(type='CrossEntropyLoss', loss_weight=_AUX_WEIGHT)
        auxiliary.append(_linear(num_classes, width, loss=loss))
        shapes |= _fc_shapes(f'head.aux_heads.{i}.fc', num_classes, width)
        shapes |= _conv_bn_shapes(f'head.aux_convs.{i}', width)
    config = dict(type='mmrep.AuxiliaryClsHead', head=config, auxiliary_heads=auxiliary)
    return config | (dict(deploy=True) if deploy else {}), shapes


def _linear(num_classes: int, in_channels: int, **options) -> dict:
    return dict(
        type='LinearClsHead', num_classes=num_classes, in_channels=in_channels, **options
    )


def _fc_shapes(name: str, num_classes: int, in_channels: int) -> dict:
    return {f'{name}.weight': (num_classes, in_channels), f'{name}.bias': (num_classes,)}


def _conv_bn_shapes(name: str, channels: int) -> dict:
    norm = ('weight', 'bias', 'running_mean', 'running_var')
    return {
        f'{name}.conv.weight': (channels, channels, 3, 3),
        **{f'{name}.bn.{leaf}': (channels,) for leaf in norm},
        f'{name}.bn.num_batches_tracked': (),
    }
