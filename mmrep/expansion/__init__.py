"""Blocks in the place of the convs of any network, and back."""

from .collapse import collapse
from .expand import Expansion, expand

__all__ = ['Expansion', 'collapse', 'expand']
