"""Write a deploy checkpoint with its config, and check that two belong together."""

from collections.abc import Mapping
from os.path import expanduser
from pathlib import Path
from typing import Any

from mmengine.config import Config
from torch import Tensor

from mmrep.checkpoints import atomic_writes, save_checkpoint, sha256_of
from mmrep.errors import CheckpointError, printable


def write_pair(
    out: Path,
    out_config: Path,
    state_dict: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    config: str,
    source: str,
) -> None:
    """Write a deploy checkpoint and its config, both or neither.

    Two files cannot be renamed in one atomic step. The config comes first, and ends with
    the checkpoint's SHA-256: a run that stops between the two leaves a config that does not
    match the checkpoint beside it, and :func:`check_pair` detects that.

    Args:
        out: The checkpoint.
        out_config: The config.
        state_dict: The weights.
        meta: The ``meta`` of the checkpoint.
        config: The text of the config.
        source: Name of the train-form config.

    Raises:
        UserError: If they cannot be written; then nothing has changed.
    """
    with atomic_writes(out_config, out) as (config_file, checkpoint_file):
        save_checkpoint(checkpoint_file, out.suffix, state_dict, meta)
        title = f'# The deploy form of {_inert(printable(source))}.\n'
        file, digest = _inert(ascii(out.name)), sha256_of(checkpoint_file)
        record = f'fused_checkpoint = dict(file={file}, sha256={digest!r})\n'
        config_file.write_text(title + config + record, 'utf-8')


def _inert(text: str) -> str:
    """Escape braces, so that mmengine finds no ``{{ variable }}`` to replace."""
    return text.replace('{', r'\x7b')


def check_pair(
    config: Config, config_path: str | Path, checkpoint_path: str | Path, checkpoint: Any
) -> None:
    """Refuse a deploy config with another checkpoint than the one it was written with.

    This checks only checkpoints whose ``meta`` records that they were fused and verified,
    and those with the file name that the config records. Other weights, as those trained
    further with the deploy config, are accepted.

    Args:
        config: The config; one that ``write_pair`` wrote records its checkpoint.
        config_path: Its file, for the error.
        checkpoint_path: The file of the checkpoint.
        checkpoint: What was read from it.

    Raises:
        CheckpointError: If the two were not written together.
    """
    pair = config.get('fused_checkpoint')
    if not isinstance(pair, dict):
        return
    path = Path(expanduser(checkpoint_path))
    takes_part = _is_verified(checkpoint) or path.name == pair.get('file')
    if takes_part and sha256_of(path) != pair.get('sha256'):
        raise CheckpointError(
            f'{config_path} was not written together with {checkpoint_path}: fuse again, '
            'or use them anyway with --cfg-options fused_checkpoint=None'
        )


def _is_verified(checkpoint: Any) -> bool:
    """Whether a checkpoint is what :func:`deploy_checkpoint` writes."""
    meta = checkpoint.get('meta') if isinstance(checkpoint, dict) else None
    record = meta.get('mmrep') if isinstance(meta, dict) else None
    return isinstance(record, dict) and 'source_config' in record
