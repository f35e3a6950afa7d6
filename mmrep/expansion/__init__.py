"""Replace the convs of any network by blocks, and blocks by plain convs again."""

from .builder import build_expanded
from .collapse import collapse, norms_after
from .conv_layers import CONV_LAYERS
from .expand import Expansion, expand

__all__ = [
    'CONV_LAYERS',
    'Expansion',
    'build_expanded',
    'collapse',
    'expand',
    'norms_after',
]
