"""Checkpoints: read without running code, load strictly, write atomically."""

from .loading import (
    is_deploy_form,
    kept_meta,
    listed,
    load_strictly,
    misfits,
    state_dict_of,
)
from .reading import read_checkpoint, use_safe_reading
from .writing import atomic_write, plain, refuse_existing, sha256_of, write_checkpoint

__all__ = [
    'atomic_write',
    'is_deploy_form',
    'kept_meta',
    'listed',
    'load_strictly',
    'misfits',
    'plain',
    'read_checkpoint',
    'refuse_existing',
    'sha256_of',
    'state_dict_of',
    'use_safe_reading',
    'write_checkpoint',
]
