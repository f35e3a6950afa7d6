"""A deploy checkpoint and its config, which belong together."""

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

    No system gives two files their names at once. The config comes first, and ends with the
    checkpoint's SHA-256: whatever stops between the two leaves a config that is not of the
    checkpoint beside it, and :func:`check_pair` sees that.

    Args:
        out: The checkpoint.
        out_config: The config.
        state_dict: The weights.
        meta: What is said of them.
        config: The text of the config.
        source: Name of the config that it is the deploy form of.

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
    """Text in which mmengine finds no ``{{ variable }}`` to replace."""
    return text.replace('{', r'\x7b')


def check_pair(
    config: Config, config_path: str | Path, checkpoint_path: str | Path, checkpoint: Any
) -> None:
    """Refuse the config of one deploy checkpoint with another.

    This asks only of checkpoints that say of themselves that they were fused and verified,
    or that have the file name for which the config was written. Weights that were trained
    further with the deploy config, or come from elsewhere, are no half of a pair.

    Args:
        config: The config, which knows its checkpoint if ``write_pair`` wrote it.
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
            'or take them all the same with --cfg-options fused_checkpoint=None'
        )


def _is_verified(checkpoint: Any) -> bool:
    """Whether a checkpoint is what :func:`deploy_checkpoint` writes."""
    meta = checkpoint.get('meta') if isinstance(checkpoint, dict) else None
    record = meta.get('mmrep') if isinstance(meta, dict) else None
    return isinstance(record, dict) and 'source_config' in record
