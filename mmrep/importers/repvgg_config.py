"""Read the architecture of a RepVGG from its weights."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

from mmrep.errors import CheckpointError
from mmrep.models.backbones import RepVGG
from mmrep.models.layers.se_layer import make_divisible

from .layout import Layout

#: ``RepVGG``'s default ``base_channels`` and ``stem_channels``.
_BASE = 64

#: Squeeze ratios to try; several may do, and these two have names.
_RATIOS = (16, 4, *range(1, 65))


class _Block(NamedTuple):
    """The shape of a block; ``squeezed`` is the SE layer's width, 0 where there is none."""

    in_channels: int
    out_channels: int
    groups: int
    squeezed: int


def repvgg_config(
    state: Mapping[str, Tensor], layout: Layout, arch: str | None = None
) -> dict:
    """The config of the RepVGG that has these weights.

    Strides and dilations are not in the weights: they are the architecture's, but for a
    stage that begins with an identity branch, which tells that it has stride 1.

    Args:
        state: The weights, under the backbone's keys.
        layout: Where they come from.
        arch: Name of the architecture. Default: None, which means the named one of these
            shapes or, where there is none, a dict.

    Raises:
        CheckpointError: If a block is missing, or ``arch`` is unknown; says only that.
    """
    names = RepVGG.arch_settings
    if arch is not None and arch not in names:
        raise CheckpointError(f'arch {arch!r} is unknown; choose from {", ".join(names)}')
    stem = _block(state, 'stem')
    stages = _stages(state, stem.out_channels)
    if not stages:
        raise CheckpointError('it has no stages')
    if arch is None:
        arch = {**_measure(stem, stages), **layout.arch_options}
        blocks = [stem, *(block for stage in stages for block in stage)]
        arch = next((n for n in names if _is_named(arch, names[n], blocks)), arch)
    config = dict(type='mmrep.RepVGG', arch=arch, out_indices=(len(stages) - 1,))
    settings = names[arch] if isinstance(arch, str) else arch
    own_strides = tuple(settings.get('strides') or (2,) * len(stages))
    strides = tuple(
        1 if f'stage_{i}.0.branch_norm.running_mean' in state else stride
        for i, stride in enumerate(own_strides, 1)
    )
    if strides != own_strides:
        config['strides'] = strides
    if stem.in_channels != 3:
        config['in_channels'] = stem.in_channels
    if any(key.startswith('ppf.') for key in state):
        config['add_ppf'] = True
    return config


def _block(
    state: Mapping[str, Tensor], name: str, in_channels: int | None = None
) -> _Block:
    """The shape of a block; one whose input is not known has one group."""
    keys = (f'{name}.branch_3x3.conv.weight', f'{name}.branch_reparam.weight')
    weight = next((state[key] for key in keys if key in state), None)
    if weight is None or weight.dim() != 4:
        raise CheckpointError(f"the 3x3 conv of mmrep's block {name} is missing")
    outs, ins = weight.shape[:2]
    squeeze = state.get(f'{name}.se_layer.conv1.conv.weight')
    if squeeze is not None and squeeze.dim() != 4:
        raise CheckpointError(f"a weight of mmrep's {name}.se_layer is that of no conv")
    groups = 1 if in_channels is None else max(in_channels // max(ins, 1), 1)
    return _Block(ins * groups, outs, groups, 0 if squeeze is None else len(squeeze))


def _stages(state: Mapping[str, Tensor], channels: int) -> list[list[_Block]]:
    """The blocks of every stage, which get ``channels`` from the stem."""
    # Python reads no number of thousands of digits; such a block is missed below.
    found = map(re.compile(r'stage_(\d{1,9})\.(\d{1,9})\.').match, state)
    last = dict(sorted((int(m[1]), int(m[2])) for m in found if m))
    stages = []
    for i in range(1, 1 + max(last, default=0)):
        stages.append([])
        # One that is not there is missed by its first block.
        for j in range(1 + last.get(i, 0)):
            stages[-1].append(_block(state, f'stage_{i}.{j}', channels))
            channels = stages[-1][-1].out_channels
    return stages


def _measure(stem: _Block, stages: list[list[_Block]]) -> dict:
    """The architecture as a dict: what ``RepVGG`` takes as ``arch``."""
    widths = [stage[-1].out_channels for stage in stages]
    blocks = [block for stage in stages for block in stage]
    arch = dict(
        num_blocks=tuple(len(stage) for stage in stages),
        width_factor=tuple(width / (_BASE * 2**i) for i, width in enumerate(widths)),
    )
    groups = {i: block.groups for i, block in enumerate(blocks, 1) if block.groups > 1}
    if groups:
        arch['group_layer_map'] = groups
    if stem.squeezed:
        arch['se_cfg'] = _se_cfg([stem, *blocks])
    if stem.out_channels != min(_BASE, widths[0]):
        arch['stem_channels'] = stem.out_channels
    return arch


def _fits(se_cfg: dict | None, blocks: Iterable[_Block]) -> bool:
    """Whether a config is that of the SE layers of blocks, or says that there are none."""
    if not se_cfg:
        return not any(block.squeezed for block in blocks)
    ratio, divisor = se_cfg['ratio'], se_cfg['divisor']
    return all(
        make_divisible(b.out_channels // ratio, divisor) == b.squeezed for b in blocks
    )


def _se_cfg(blocks: list[_Block]) -> dict:
    """The SE layers' config: one ratio for all blocks, rounded to 1 or to 8."""
    candidates = (dict(ratio=r, divisor=d) for d in (1, 8) for r in _RATIOS)
    fitting = next((cfg for cfg in candidates if _fits(cfg, blocks)), None)
    if fitting is None:
        raise CheckpointError('its SE layers have no common squeeze ratio')
    return fitting


def _is_named(arch: dict, named: dict, blocks: list[_Block]) -> bool:
    """Whether an architecture, which has these blocks, is a named one."""
    numbers = ('num_blocks', 'width_factor')
    stem_channels = min(named.get('stem_channels', _BASE), blocks[1].out_channels)
    return (
        all(arch[key] == tuple(named[key]) for key in numbers)
        and arch.get('group_layer_map', {}) == (named['group_layer_map'] or {})
        and blocks[0].out_channels == stem_channels
        and _fits(named['se_cfg'], blocks)
    )
