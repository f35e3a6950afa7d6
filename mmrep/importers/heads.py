"""The configs of the classification heads of imported weights."""

from collections.abc import Mapping, Sequence

import torch
from torch import Size, Tensor, nn

from mmrep.errors import CheckpointError
from mmrep.registry import MODELS

#: An image size at which every feature map of a backbone has at least one pixel.
_SIZE = 64

#: The weight of RepVGGplus' auxiliary losses, in the official code.
_AUX_WEIGHT = 0.1


@torch.no_grad()
def feature_channels(config: dict) -> list[int]:
    """The channels of a backbone's outputs, found on the meta device."""
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
) -> tuple[dict | None, dict[str, Size]]:
    """The config of the head of a checkpoint, and the shapes of its weights.

    Args:
        state: The weights, with the prefix ``head.`` for those of the head.
        channels: Channels of the backbone's outputs.
        deploy: Whether the backbone is in deploy form.

    Returns:
        The config, of mmpretrain's ``LinearClsHead`` or of an ``AuxiliaryClsHead`` with
        such heads, or ``None`` if there is no head; and the shapes by key.

    Raises:
        CheckpointError: If its weight is not a matrix; the caller names the file.
    """
    main = next((p for p in ('head', 'head.head') if f'{p}.fc.weight' in state), None)
    if main is None:
        return None, {}
    weight = state[f'{main}.fc.weight']
    if weight.dim() != 2:
        raise CheckpointError("the weight of mmrep's head.fc is not a matrix")
    num_classes = len(weight)
    *others, last = channels
    config = dict(type='LinearClsHead', num_classes=num_classes, in_channels=last)
    auxiliary = []
    with torch.device('meta'):
        layers = {f'{main}.fc': nn.Linear(last, num_classes)}
        for i, width in enumerate(others):
            loss = dict(type='CrossEntropyLoss', loss_weight=_AUX_WEIGHT)
            auxiliary.append(config | dict(in_channels=width, loss=loss))
            layers[f'head.aux_heads.{i}.fc'] = nn.Linear(width, num_classes)
            layers[f'head.aux_convs.{i}.conv'] = nn.Conv2d(width, width, 3, bias=False)
            layers[f'head.aux_convs.{i}.bn'] = nn.BatchNorm2d(width)
    shapes = {
        f'{name}.{key}': value.shape
        for name, layer in layers.items()
        for key, value in layer.state_dict().items()
    }
    if main == 'head.head':
        config = dict(type='mmrep.AuxiliaryClsHead', head=config, auxiliary_heads=auxiliary)
        if deploy:
            config['deploy'] = True
    return config, shapes
