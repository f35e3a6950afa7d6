"""Backbones, blocks, heads and layers; importing this registers them."""

from . import backbones, blocks, heads, layers
from .deployed import build_deployed

__all__ = ['backbones', 'blocks', 'build_deployed', 'heads', 'layers']
