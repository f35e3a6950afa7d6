"""Read the architecture of a RepVGG from its weights."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from mmrep.errors import CheckpointError
from mmrep.models.backbones import RepVGG

from .layout import Layout
from .shapes import check_name, count_blocks, find_se_cfg, is_se_cfg, kernel, squeezed

#: ``RepVGG``'s default ``base_channels`` and ``stem_channels``.
_BASE = 64

#: Names of the main conv: in RepVGG's blocks, in blocks with one kxk conv, in
#: OREPA-RepVGG's blocks, and in deploy form.
_CONVS = (
    'branch_3x3.conv',
    'branch_kxk.conv',
    'branch_orepa.branch_kxk.conv',
    'branch_reparam',
)


class _Block(NamedTuple):
    """The shape of a block; ``squeezed`` is the SE layer's width, 0 where there is none."""

    in_channels: int
    out_channels: int
    groups: int
    squeezed: int


def repvgg_config(
    state: Mapping[str, Tensor],
    layout: Layout,
    arch: str | None = None,
    kind: type[RepVGG] = RepVGG,
) -> dict:
    """The config of the RepVGG that has these weights.

    Strides and dilations cannot be read from the weights: they are the architecture's. But
    a stage whose first block has an identity branch has stride 1.

    Args:
        state: The weights, under the backbone's keys.
        layout: Where they come from.
        arch: Name of the architecture. Default: None, the named one with these shapes or,
            if there is none, a dict.
        kind: The class of the backbone. Default: ``RepVGG``.

    Raises:
        CheckpointError: If a block is missing, or ``arch`` is unknown; the caller names the
            file.
    """
    names = kind.arch_settings
    check_name(arch, names)
    stem = _block(state, 'stem')
    stages = _stages(state, stem.out_channels)
    if not stages:
        raise CheckpointError('it has no stages')
    if arch is None:
        arch = {**_measure(stem, stages), **layout.arch_options}
        blocks = [stem, *(block for stage in stages for block in stage)]
        arch = next((n for n in names if _is_named(arch, names[n], blocks)), arch)
    config = dict(type=f'mmrep.{kind.__name__}', arch=arch, out_indices=(len(stages) - 1,))
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
    """The shape of a block; without ``in_channels``, it is taken to have one group."""
    weight = kernel(state, name, *_CONVS)
    outs, ins = weight.shape[:2]
    groups = 1 if in_channels is None else max(in_channels // max(ins, 1), 1)
    return _Block(ins * groups, outs, groups, squeezed(state, f'{name}.se_layer'))


def _stages(state: Mapping[str, Tensor], channels: int) -> list[list[_Block]]:
    """The shapes of every stage's blocks, after a stem with ``channels`` outputs."""
    stages = []
    for i, count in enumerate(count_blocks(state, 'stage_'), 1):
        stages.append([])
        for j in range(count):
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
        arch['se_cfg'] = find_se_cfg(_se_layers([stem, *blocks]))
    if stem.out_channels != min(_BASE, widths[0]):
        arch['stem_channels'] = stem.out_channels
    return arch


def _fits(se_cfg: dict | None, blocks: list[_Block]) -> bool:
    """Whether a config fits the SE layers of blocks; ``None`` means no SE layers."""
    if not se_cfg:
        return not any(block.squeezed for block in blocks)
    return is_se_cfg(se_cfg, _se_layers(blocks))


def _se_layers(blocks: list[_Block]) -> list[tuple[int, int]]:
    """The widths of blocks' SE layers, outer and inner."""
    return [(block.out_channels, block.squeezed) for block in blocks]


def _is_named(arch: dict, named: dict, blocks: list[_Block]) -> bool:
    """Whether a measured architecture with these blocks is the named one."""
    numbers = ('num_blocks', 'width_factor')
    stem_channels = min(named.get('stem_channels', _BASE), blocks[1].out_channels)
    return (
        all(arch[key] == tuple(named[key]) for key in numbers)
        and arch.get('group_layer_map', {}) == (named['group_layer_map'] or {})
        and blocks[0].out_channels == stem_channels
        and _fits(named['se_cfg'], blocks)
    )
