"""Read the architecture of a MobileOne from its weights."""

from collections.abc import Mapping
from itertools import count, takewhile

from torch import Tensor

from mmrep.checkpoints import is_deploy_form
from mmrep.errors import CheckpointError
from mmrep.models.backbones import MobileOne

from .layout import Layout
from .shapes import (
    check_name,
    count_blocks,
    factor,
    find_se_cfg,
    is_se_cfg,
    kernel,
    named_arch,
    squeezed,
)

#: ``MobileOne``'s default ``base_channels``, and its ``se_cfg``.
_BASE, _SE_CFG = 64, dict(ratio=16)


def mobileone_config(
    state: Mapping[str, Tensor], layout: Layout, arch: str | None = None
) -> dict:
    """The config of the MobileOne that has these weights.

    Strides and dilations cannot be read from the weights: they are the defaults. The
    number of branches cannot be read from a deploy form: it is that of the named
    architecture with these shapes or, if there is none, one.

    Args:
        state: The weights, under the backbone's keys.
        layout: Where they come from.
        arch: Name of the architecture. Default: None, the named one with these shapes or,
            if there is none, a dict.

    Raises:
        CheckpointError: If a block is missing, or ``arch`` is unknown; the caller names the
            file.
    """
    named = MobileOne.arch_settings
    check_name(arch, named)
    stem, deploy = _kernel(state, 'stage0'), is_deploy_form(state)
    # Every block is read; the first that is missing raises an error.
    stages = [
        {f'stage{i}.{j}': len(_kernel(state, f'stage{i}.{j}')) for j in range(n)}
        for i, n in enumerate(count_blocks(state, 'stage'), 1)
    ]
    if not stages:
        raise CheckpointError('it has no stages')
    widths = [list(blocks.values())[-1] for blocks in stages]
    base = _BASE if len(stem) == min(_BASE, widths[0]) else len(stem)
    se = [[squeezed(state, f'{name}.se') for name in blocks] for blocks in stages]
    layers = [
        (width, inner)
        for blocks, inside in zip(stages, se, strict=True)
        for width, inner in zip(blocks.values(), inside, strict=True)
        if inner
    ]
    measured = dict(
        num_blocks=tuple(len(blocks) // 2 for blocks in stages),
        width_factor=tuple(factor(width, base * 2**i) for i, width in enumerate(widths)),
        num_conv_branches=tuple(
            1 if deploy else _branches(state, f'stage{i}.0')
            for i in range(1, 1 + len(stages))
        ),
        num_se_blocks=tuple(sum(map(bool, inner[::2])) for inner in se),
    )
    untold = ('num_conv_branches',) if deploy else ()
    if arch is None:
        arch = named_arch(measured, named, untold) if base == _BASE else measured
    config = dict(type='mmrep.MobileOne', arch=arch, out_indices=(len(stages) - 1,))
    if base != _BASE:
        config['base_channels'] = base
    if not is_se_cfg(_SE_CFG, layers):
        config['se_cfg'] = find_se_cfg(layers)
    if stem.shape[1] != 3:
        config['in_channels'] = stem.shape[1]
    return config


def _kernel(state: Mapping[str, Tensor], block: str) -> Tensor:
    return kernel(state, block, 'branch_conv_list.0.conv', 'branch_reparam')


def _branches(state: Mapping[str, Tensor], block: str) -> int:
    """The number of a block's main branches, which are numbered from 0."""
    keys = (f'{block}.branch_conv_list.{n}.conv.weight' for n in count())
    return sum(1 for _ in takewhile(state.__contains__, keys))
