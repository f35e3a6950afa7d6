"""Backbones, blocks, heads and layers; importing this registers them."""

from . import backbones, blocks, heads, layers

__all__ = ['backbones', 'blocks', 'heads', 'layers']
