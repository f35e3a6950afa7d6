"""Small layers that the blocks use, and how layers of mmcv are folded."""

from . import mmcv_layers
from .activation import build_activation
from .channel_bias import ChannelBias
from .cosine_filters import CosineFilters
from .grn import GRN
from .identity_conv import IdentityConv1x1
from .layer_norm_2d import LayerNorm2d
from .mtsppf import MTSPPF
from .pad_or_crop import PadOrCrop
from .pointwise_spatial import PointwiseSpatial
from .pooling import DilatedAvgPool2d
from .recompute import run_block
from .se_layer import SELayer

__all__ = [
    'GRN',
    'MTSPPF',
    'ChannelBias',
    'CosineFilters',
    'DilatedAvgPool2d',
    'IdentityConv1x1',
    'LayerNorm2d',
    'PadOrCrop',
    'PointwiseSpatial',
    'SELayer',
    'build_activation',
    'mmcv_layers',
    'run_block',
]
