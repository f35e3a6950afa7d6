"""Build an activation that works in place if its type supports it."""

import inspect

from mmcv.cnn import build_activation_layer
from mmengine.registry import MODELS
from torch import nn


def build_activation(act_cfg: dict) -> nn.Module:
    """Build an activation; ``inplace`` defaults to True if its type takes it."""
    act_type = act_cfg['type']
    act_class = MODELS.get(act_type) if isinstance(act_type, str) else act_type
    if act_class and 'inplace' in inspect.signature(act_class).parameters:
        act_cfg = {'inplace': True, **act_cfg}
    return build_activation_layer(act_cfg)
