"""Expand a model by its config and checkpoint, and write those of the expanded model."""

import copy
import os
from dataclasses import dataclass
from functools import partial
from os.path import expanduser
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmrep.checkpoints import (
    atomic_writes,
    kept_meta,
    load_strictly,
    out_path,
    read_checkpoint,
    refuse_existing,
    save_checkpoint,
    state_dict_of,
)
from mmrep.errors import ConfigError, UserError
from mmrep.expansion import Expansion, expand
from mmrep.reparam import branch_by_branch, compare_named, count_parameters, flatten_outputs

from .building import build_model
from .config import Shape, input_shape, is_expanded
from .config_text import read_text, written_config
from .running import check_differences, run_form, seeded_input

#: Short names of blocks, for the command line.
BLOCKS = {
    'ACB': 'mmrep.AsymmetricConvBlock',
    'DBB': 'mmrep.DiverseBranchBlock',
    'DilatedReparam': 'mmrep.DilatedReparamBlock',
    'LargeKernel': 'mmrep.LargeKernelBlock',
    'MobileOne': 'mmrep.MobileOneBlock',
    'OREPA': 'mmrep.OREPABlock',
    'OREPARepVGG': 'mmrep.OREPARepVGGBlock',
    'QARepVGG': 'mmrep.QARepVGGBlock',
    'RepVGG': 'mmrep.RepVGGBlock',
}

#: The largest relative L2 error of an output: the convs compute exactly as before.
_RTOL = 1e-6


@dataclass(frozen=True)
class ExpandedFiles:
    """What :func:`expand_checkpoint` did, or would do.

    Args:
        expansion: Which convs are replaced, and why the others are not.
        shape: Shape of the input that the model was run with.
        params_before: Number of parameters of the plain model.
        params_after: Of the expanded one; ``None`` if nothing was written.
        out: The config that was written, if one was.
        out_checkpoint: The checkpoint that was written, if one was.
    """

    expansion: Expansion
    shape: tuple[int, ...]
    params_before: int
    params_after: int | None = None
    out: Path | None = None
    out_checkpoint: Path | None = None


def expand_checkpoint(
    config: Config,
    config_path: str | Path,
    block: str,
    checkpoint: str | Path | None = None,
    out: str | Path | None = None,
    shape: Shape | None = None,
    overwrite: bool = False,
    **choice: Any,
) -> ExpandedFiles:
    """Write the config and weights of an expanded model that computes the same.

    Args:
        config: The config of a host's model.
        config_path: The config's file, from which the new config inherits. A lazy config
            (one that imports its types or bases) is copied into the new one instead, since
            mmengine lets only lazy configs inherit from it.
        block: The type of the block, or a name in ``BLOCKS``.
        checkpoint: Weights of the model. Default: None; then no weights are written.
        out: The config to write; the weights go beside it, as ``.pth``. Default: None;
            then nothing is written.
        shape: Channels, height and width of the input. Default: the config's.
        overwrite: Whether to replace existing files. Default: False.
        **choice: ``kernel_sizes``, ``include`` and ``exclude`` of
            :func:`~mmrep.expansion.expand`.

    Raises:
        UserError: With one sentence, if anything is wrong; then nothing is written.
    """
    if is_expanded(config):
        raise ConfigError(
            'this config has blocks in the place of convs already: give the plain config'
        )
    paths = []
    if out is not None:
        out = out_path(out, '.py')
        paths = [out, *([out.with_suffix('.pth')] if checkpoint is not None else [])]
        sources = [Path(expanduser(p)) for p in (config_path, checkpoint) if p is not None]
        for source in sources:
            if source.resolve() in [path.resolve() for path in paths]:
                raise UserError(f'{out} would replace {source}: give another name')
        refuse_existing(*paths, overwrite=overwrite)
    block_cfg = dict(type=BLOCKS.get(block, block))
    given = {} if shape is None else dict(shape=shape)
    # Not config.model.type, which is the class if types are imported.
    of = dict.__getitem__(config.model, 'type')
    options = dict(of=of, block=block_cfg, **given, **choice)
    shape = (1, *(shape or input_shape(config)))
    run = partial(run_form, x=seeded_input(shape, seed=0), form='plain')

    model = build_model(config, unset=checkpoint is not None)
    meta = {}
    if checkpoint is not None:
        source = read_checkpoint(expanduser(checkpoint), mmap=False)
        load_strictly(model, state_dict_of(source, checkpoint), checkpoint, assign=True)
        meta = kept_meta(source)
    before = count_parameters(model)
    outputs = flatten_outputs(run(model))
    try:
        expansion = expand(model, block_cfg, run, dry_run=out is None, **choice)
    except (TypeError, ValueError) as error:
        raise UserError(f'this model cannot be expanded: {error}') from error
    if out is None:
        return ExpandedFiles(expansion, shape, before)

    text, new_config = _expanded_config(config, config_path, options, out)
    built = build_model(new_config, how=' with blocks')
    if checkpoint is not None:
        load_strictly(built, model.state_dict(), 'the expanded model')
        with branch_by_branch(built):
            differences = compare_named(outputs, flatten_outputs(run(built)))
        check_differences(differences, _RTOL, 'from the plain model', 'report the config')
    with atomic_writes(*paths) as (config_file, *checkpoint_files):
        config_file.write_text(text, 'utf-8')
        for file in checkpoint_files:
            save_checkpoint(file, '.pth', model.state_dict(), meta)
    return ExpandedFiles(expansion, shape, before, count_parameters(model), *paths)


def _expanded_config(
    config: Config, path: str | Path, options: dict[str, Any], out: Path
) -> tuple[str, Config]:
    """The text of a config that expands another's model, and the config read from it."""
    base = Path(expanduser(path)).resolve()
    try:
        # The text to be written, but with the absolute path of its base.
        read = read_text(_inheriting(base, options))
    except RuntimeError:
        # mmengine's: only a lazy config may inherit from a lazy one. Write all of it.
        whole = copy.deepcopy(config)
        whole.model.update(type='mmrep.Expanded', expand=options)
        return written_config(whole)
    return _inheriting(os.path.relpath(base, out.resolve().parent), options), read


def _inheriting(base: str | Path, options: dict[str, Any]) -> str:
    model = dict(type='mmrep.Expanded', expand=options)
    return f'_base_ = {str(base)!r}\n\n{Config(dict(model=model)).pretty_text}'
