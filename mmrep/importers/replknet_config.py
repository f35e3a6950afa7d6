"""Read the architecture of a RepLKNet from its weights."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from mmrep.checkpoints import is_deploy_form
from mmrep.errors import CheckpointError
from mmrep.models.backbones import RepLKNet

from .layout import Layout
from .shapes import check_name, count_blocks, factor, kernel, named_arch

#: ``RepLKNet``'s default ``ffn_ratio``.
_FFN_RATIO = 4


class _Pair(NamedTuple):
    """The shapes of a block with a large kernel, and of the ``ConvFFN`` after it."""

    channels: int
    dw_channels: int
    kernel_size: int
    hidden_channels: int


def replknet_config(
    state: Mapping[str, Tensor], layout: Layout, arch: str | None = None
) -> dict:
    """The config of the RepLKNet that has these weights.

    Strides and dilations cannot be read from the weights: they are the defaults. The
    small kernel cannot be read from a deploy form: it is that of the named architecture
    with these shapes or, if there is none, ``None``.

    Args:
        state: The weights, under the backbone's keys.
        layout: Where they come from.
        arch: Name of the architecture. Default: None, the named one with these shapes or,
            if there is none, a dict.

    Raises:
        CheckpointError: If a block is missing, or ``arch`` is unknown; the caller names the
            file.
    """
    named = RepLKNet.arch_settings
    check_name(arch, named)
    # Every pair is read; the first that is missing raises an error.
    stages = [
        [_pair(state, f'stages.{i}.blocks', j) for j in range(0, number, 2)]
        for i, number in enumerate(count_blocks(state, r'stages\.', r'blocks\.', first=0))
    ]
    if not stages:
        raise CheckpointError('it has no stages')
    first = stages[0][0]
    small = state.get('stages.0.blocks.0.large_kernel.small_conv.conv.weight')
    measured = dict(
        large_kernel_sizes=tuple(pairs[0].kernel_size for pairs in stages),
        layers=tuple(len(pairs) for pairs in stages),
        channels=tuple(pairs[0].channels for pairs in stages),
        small_kernel=None if small is None else small.shape[-1],
        dw_ratio=factor(first.dw_channels, first.channels),
    )
    untold = ('small_kernel',) if is_deploy_form(state) else ()
    if arch is None:
        arch = named_arch(measured, named, untold)
    # Each output has a norm.
    outputs = [i for i in range(len(stages)) if f'stages.{i}.norm.weight' in state]
    if not outputs:
        raise CheckpointError('no stage has the norm of an output')
    config = dict(type='mmrep.RepLKNet', arch=arch, out_indices=tuple(outputs))
    if (ratio := factor(first.hidden_channels, first.channels)) != _FFN_RATIO:
        config['ffn_ratio'] = ratio
    stem = kernel(state, 'stem.0', 'conv')
    if stem.shape[1] != 3:
        config['in_channels'] = stem.shape[1]
    return config


def _pair(state: Mapping[str, Tensor], blocks: str, number: int) -> _Pair:
    """The shapes of the pair whose first block has this number."""
    block, ffn = f'{blocks}.{number}', f'{blocks}.{number + 1}'
    large = kernel(state, f'{block}.large_kernel', 'lkb_origin.conv', 'lkb_reparam')
    return _Pair(
        len(kernel(state, block, 'pw2.conv')),
        len(large),
        large.shape[-1],
        len(kernel(state, ffn, 'pw1.conv')),
    )
