"""Compare weights with the model that they are said to be of."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mmrep.registry import MODELS

from .renaming import listed

#: Shapes by key.
Shapes = Mapping[str, Sequence[int]]

#: A size at which every map of a backbone still has a pixel.
_SIZE = 64


@torch.no_grad()
def feature_channels(config: dict) -> list[int]:
    """The channels of a backbone's outputs; nothing is computed."""
    with torch.device('meta'):
        model = MODELS.build({**config, 'deploy': False}).eval()
        x = torch.zeros(1, config.get('in_channels', 3), _SIZE, _SIZE)
    return [feature.shape[1] for feature in model(x)]


def misfits(
    expected: Shapes, state: Mapping[str, Tensor], origin: Mapping[str, str]
) -> str:
    """What is wrong with weights, in words; '' if nothing is.

    Args:
        expected: The shapes that they should have.
        state: The weights.
        origin: What the source calls them.
    """
    missing = [key for key in expected if key not in state]
    unexpected = [origin.get(key, key) for key in state if key not in expected]
    misshapen = [
        f'{origin.get(key, key)} ({tuple(state[key].shape)}, not {tuple(shape)})'
        for key, shape in expected.items()
        if key in state and tuple(state[key].shape) != tuple(shape)
    ]
    found = (
        ('missing, in the names of mmrep', missing),
        ('unexpected', unexpected),
        ('of another shape', misshapen),
    )
    return '; '.join(f'{len(keys)} {kind}: {listed(keys)}' for kind, keys in found if keys)
