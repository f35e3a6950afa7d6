"""Import checkpoints of other projects as checkpoints of mmrep's models.

A layout (one file each) maps a project's keys to mmrep's; a family (RepVGG, DBB) reads the
architecture from the shapes. :func:`import_checkpoint` does the rest.
"""

from .importing import LAYOUTS, Imported, import_checkpoint

__all__ = ['LAYOUTS', 'Imported', 'import_checkpoint']
