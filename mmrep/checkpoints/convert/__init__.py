"""Checkpoints of other projects as checkpoints of mmrep's models.

A layout (one file each) says by which names a project stores what; a family (RepVGG, DBB)
reads the architecture from the shapes. :func:`convert_checkpoint` does the rest.
"""

from .converter import LAYOUTS, Converted, convert_checkpoint

__all__ = ['LAYOUTS', 'Converted', 'convert_checkpoint']
