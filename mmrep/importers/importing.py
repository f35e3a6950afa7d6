"""Import another project's checkpoint for one of mmrep's models."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from os.path import expanduser
from pathlib import Path

import torch
from torch import Tensor, nn

from mmrep.checkpoints import (
    is_deploy_form,
    kept_meta,
    listed,
    misfits,
    out_path,
    read_checkpoint,
    refuse_existing,
    sha256_of,
    state_dict_of,
    write_checkpoint,
)
from mmrep.errors import CheckpointError, UserError, reason
from mmrep.registry import MODELS
from mmrep.version import __version__

from .acnet import ACNET
from .dbb import DBB
from .heads import count_auxiliary, describe_head, feature_channels
from .keras import KERAS, is_hdf5, read_keras
from .layout import Layout, Renamed
from .mmpretrain import MMPRETRAIN
from .mobileone import MMPRETRAIN_MOBILEONE, MOBILEONE, TIMM_MOBILEONE
from .orepa import OREPA, OREPA_REPVGG
from .qarepvgg import QAREPVGG
from .replknet import MMPRETRAIN_REPLKNET, REPLKNET
from .repopt import REPOPT, REPOPT_SEARCH
from .repvgg import REPVGG
from .repvggplus import REPVGGPLUS
from .timm import TIMM
from .unireplknet import UNIREPLKNET

#: The layouts, by name.
LAYOUTS = {
    layout.name: layout
    for layout in (
        *(REPVGG, REPVGGPLUS, DBB, TIMM, MMPRETRAIN, KERAS),
        *(MOBILEONE, TIMM_MOBILEONE, MMPRETRAIN_MOBILEONE),
        *(ACNET, OREPA, OREPA_REPVGG, QAREPVGG, REPOPT, REPOPT_SEARCH),
        *(UNIREPLKNET, REPLKNET, MMPRETRAIN_REPLKNET),
    )
}


@dataclass(frozen=True)
class Imported:
    """The result of :func:`import_checkpoint`.

    Args:
        layout: Name of the source's layout.
        backbone: Config of the backbone.
        head: Config of the head; ``None`` where the source has none.
        used: Number of the source's keys that were used.
        left_out: Number of keys that were left out, by what they are.
        note: What users must know; '' for nothing.
        out: The file that was written.
    """

    layout: str
    backbone: dict
    head: dict | None
    used: int
    left_out: Mapping[str, int]
    note: str
    out: Path


def import_checkpoint(
    source: str | Path,
    out: str | Path,
    layout: str = 'auto',
    arch: str | None = None,
    overwrite: bool = False,
) -> Imported:
    """Import a checkpoint: rename its weights, check that they fit, and write them.

    The result has mmpretrain's format: ``state_dict`` with ``backbone.`` and ``head.``
    keys. Its ``meta['backbone']`` and ``meta['head']`` are the configs that go with it.

    Args:
        source: The checkpoint, in train or deploy form.
        out: The file to write.
        layout: One of ``LAYOUTS``. Default: ``'auto'``, found from the keys.
        arch: Name of the architecture. Default: None, found from the shapes.
        overwrite: Whether to replace an existing file. Default: False.

    Raises:
        UserError: If anything is wrong, in one sentence; then nothing is written.
    """
    # A string: a Path would turn the '//' of a URL into '/'.
    source, out = expanduser(source), out_path(out)
    if Path(source).resolve() == out.resolve():
        raise UserError(f'{out} would replace its source: give another name')
    refuse_existing(out, overwrite=overwrite)
    if is_hdf5(source):
        weights, meta = read_keras(source), {}
    else:
        checkpoint = read_checkpoint(source)
        weights, meta = state_dict_of(checkpoint, source), kept_meta(checkpoint)
    empty = [key for key, value in weights.items() if not value.numel()]
    if empty:
        raise CheckpointError(
            f'{source} holds weights without elements ({listed(empty)}): give a '
            'whole and unchanged checkpoint'
        )
    chosen = _find_layout(weights, layout, source)
    renamed = chosen.rename(weights, source)
    try:
        backbone, head = _prove(renamed, chosen, arch)
    except CheckpointError as error:
        remedy = (
            'give a whole and unchanged checkpoint'
            if arch is None
            else f'leave --arch {arch} out to have it found'
        )
        raise CheckpointError(f'{source} cannot be imported: {remedy} ({error})') from None
    broken = [
        renamed.origin.get(key, key)
        for key, value in renamed.state.items()
        if value.is_floating_point() and not _is_finite(value)
    ]
    if broken:
        raise CheckpointError(
            f'{source} holds weights that are nan or inf ({listed(broken)}): give a '
            'checkpoint from before its training diverged'
        )
    made = dict(
        version=__version__,
        source=Path(source).name,
        source_sha256=sha256_of(source),
        source_layout=chosen.name,
    )
    meta |= dict(backbone=backbone, head=head, mmrep=made)
    write_checkpoint(out, renamed.state, meta)
    note = chosen.deploy_note if is_deploy_form(renamed.state) else ''
    used = len(weights) - renamed.left_out.total()
    return Imported(chosen.name, backbone, head, used, renamed.left_out, note, out)


def _is_finite(value: Tensor) -> bool:
    # isfinite does not support most dtypes of 8 bits.
    value = value.float() if value.element_size() == 1 else value
    return bool(value.isfinite().all())


def _find_layout(weights: Mapping[str, Tensor], name: str, source: str) -> Layout:
    """The layout of this name or, for ``'auto'``, the only one that weights match."""
    if name != 'auto':
        return LAYOUTS[name]
    found = [layout for layout in LAYOUTS.values() if layout.knows(weights)]
    if len(found) == 1:
        return found[0]
    names = ', '.join(layout.name for layout in found or LAYOUTS.values())
    if found:
        raise CheckpointError(
            f'{source} has keys of several layouts: name one of {names} with --from'
        )
    raise CheckpointError(
        f'{source} matches none of the layouts {names} (its keys are {listed(weights)}): '
        'give a checkpoint of one of them'
    )


def _prove(renamed: Renamed, layout: Layout, arch: str | None) -> tuple[dict, dict | None]:
    """Load renamed weights strictly into the backbone that they belong to.

    Buffers that the source lacks are added to the weights.

    Returns:
        The configs of the backbone and of the head.

    Raises:
        CheckpointError: If a key or a shape does not fit; the caller names the file.
    """
    state = renamed.state
    deploy = is_deploy_form(state)
    own_state = {
        key.removeprefix('backbone.'): value
        for key, value in state.items()
        if key.startswith('backbone.')
    }
    backbone = layout.family(own_state, layout, arch) | copy.deepcopy(dict(layout.options))
    backbone['out_indices'] = (*range(count_auxiliary(state)), *backbone['out_indices'])
    if deploy:
        backbone['deploy'] = True
    try:
        with torch.device('meta'):
            # Without memory: the network may be much larger than the file.
            own = nn.ModuleDict({'backbone': MODELS.build(backbone)}).state_dict()
        channels = feature_channels(backbone)
    except Exception as error:
        # The shapes may be arbitrary.
        raise CheckpointError(f'{backbone} cannot be built: {reason(error)}') from error
    head, shapes = describe_head(state, channels, deploy)
    shapes |= {key: value.shape for key, value in own.items()}
    # Older weights lack the counters of norms, on which no output depends. A conv fused
    # elsewhere lacks reparam_start, since it computes the same for every input size.
    buffers = {key: torch.tensor(0) for key in shapes if key.endswith('_batches_tracked')}
    buffers |= {key: own[key] for key in own if key.endswith('.reparam_start')}
    dtypes = {key: value.dtype for key, value in own.items()}
    problems = misfits(shapes, {**buffers, **state}, dtypes, renamed.origin)
    if problems:
        raise CheckpointError(problems)
    model = nn.ModuleDict({'backbone': MODELS.build(backbone)})
    buffers.update((k, v) for k, v in model.state_dict().items() if k in buffers)
    state |= {key: value for key, value in buffers.items() if key not in state}
    model.load_state_dict({key: state[key] for key in own})
    return backbone, head
