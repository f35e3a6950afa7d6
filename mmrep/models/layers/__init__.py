"""Small layers that blocks need, and how foreign conv layers are folded."""

from . import mmcv_layers
from .activation import build_activation
from .cosine_filters import CosineFilters
from .identity_conv import IdentityConv1x1
from .mtsppf import MTSPPF
from .pad_or_crop import PadOrCrop
from .pointwise_spatial import PointwiseSpatial
from .pooling import DilatedAvgPool2d
from .recompute import run_block
from .se_layer import SELayer

__all__ = [
    'MTSPPF',
    'CosineFilters',
    'DilatedAvgPool2d',
    'IdentityConv1x1',
    'PadOrCrop',
    'PointwiseSpatial',
    'SELayer',
    'build_activation',
    'mmcv_layers',
    'run_block',
]
