"""Checkpoints: read without running code, load strictly, write atomically."""

from .atomic import (
    atomic_write,
    atomic_writes,
    out_path,
    refuse_existing,
    refuse_unwritable,
)
from .loading import (
    is_deploy_form,
    kept_meta,
    listed,
    load_strictly,
    misfits,
    state_dict_of,
)
from .reading import read_checkpoint, use_safe_reading
from .writing import plain, save_checkpoint, sha256_of, write_checkpoint

__all__ = [
    'atomic_write',
    'atomic_writes',
    'is_deploy_form',
    'kept_meta',
    'listed',
    'load_strictly',
    'misfits',
    'out_path',
    'plain',
    'read_checkpoint',
    'refuse_existing',
    'refuse_unwritable',
    'save_checkpoint',
    'sha256_of',
    'state_dict_of',
    'use_safe_reading',
    'write_checkpoint',
]
