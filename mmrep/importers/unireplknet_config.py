"""Read the architecture of a UniRepLKNet from its weights."""

from collections.abc import Mapping

from torch import Tensor

from mmrep.errors import CheckpointError
from mmrep.models.backbones import UniRepLKNet

from .layout import Layout
from .shapes import check_name, count_blocks, kernel, named_arch

_CONVS = ('branch_large.conv', 'branch_kxk.conv', 'branch_reparam')


def unireplknet_config(
    state: Mapping[str, Tensor], layout: Layout, arch: str | None = None
) -> dict:
    """The config of the UniRepLKNet that has these weights.

    Args:
        state: The weights, under the backbone's keys.
        layout: Where they come from.
        arch: Name of the architecture. Default: None, the named one with these shapes or,
            if there is none, a dict.

    Raises:
        CheckpointError: If a block is missing, or ``arch`` is unknown; the caller names the
            file.
    """
    named = UniRepLKNet.arch_settings
    check_name(arch, named)
    stages = [
        [kernel(state, f'stage_{i}.blocks.{j}.spatial', *_CONVS) for j in range(number)]
        for i, number in enumerate(count_blocks(state, 'stage_', r'blocks\.'), 1)
    ]
    if not stages:
        raise CheckpointError('it has no stages')
    measured = dict(
        channels=tuple(len(blocks[0]) for blocks in stages),
        kernel_sizes=tuple(tuple(weight.shape[-1] for weight in b) for b in stages),
    )
    if arch is None:
        arch = named_arch(measured, named)
    # Each output has a norm. A norm of the last stage only is that of a classifier.
    outputs = [i for i in range(len(stages)) if f'norm_{i + 1}.weight' in state]
    config = dict(type='mmrep.UniRepLKNet', arch=arch, out_indices=tuple(outputs))
    if outputs != [len(stages) - 1]:
        config['gap_before_final_norm'] = False
    stem = kernel(state, 'stem', '0.conv')
    if stem.shape[1] != 3:
        config['in_channels'] = stem.shape[1]
    return config
