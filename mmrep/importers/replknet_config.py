"""Read the architecture of a RepLKNet from its weights."""

from collections.abc import Mapping

from torch import Tensor

from mmrep.checkpoints import is_deploy_form
from mmrep.errors import CheckpointError
from mmrep.models.backbones import RepLKNet

from .layout import Layout
from .shapes import check_name, count_blocks, factor, kernel

#: ``RepLKNet``'s default ``ffn_ratio``.
_FFN_RATIO = 4


def replknet_config(
    state: Mapping[str, Tensor], layout: Layout, arch: str | None = None
) -> dict:
    """The config of the RepLKNet that has these weights.

    Strides and dilations are not in the weights: they are the default. A deploy form does
    not tell the small kernel, either: it is that of the named architecture of its shapes,
    or none.

    Args:
        state: The weights, under the backbone's keys.
        layout: Where they come from.
        arch: Name of the architecture. Default: None, which means the named one of these
            shapes or, where there is none, a dict.

    Raises:
        CheckpointError: If a block is missing, or ``arch`` is unknown; says only that.
    """
    named = RepLKNet.arch_settings
    check_name(arch, named)
    # A pair is two blocks.
    counts = list(count_blocks(state, r'stages\.', r'blocks\.', first=0))
    if not counts:
        raise CheckpointError('it has no stages')
    large, outer, hidden = [], [], []
    for i in range(len(counts)):
        first, ffn = (f'stages.{i}.blocks.{j}' for j in (0, 1))
        names = ('lkb_origin.conv', 'lkb_reparam')
        large.append(kernel(state, f'{first}.large_kernel', *names))
        outer.append(len(kernel(state, first, 'pw2.conv')))
        hidden.append(len(kernel(state, ffn, 'pw1.conv')))
    small = state.get('stages.0.blocks.0.large_kernel.small_conv.conv.weight')
    measured = dict(
        large_kernel_sizes=tuple(weight.shape[-1] for weight in large),
        layers=tuple(count // 2 for count in counts),
        channels=tuple(outer),
        small_kernel=None if small is None else small.shape[-1],
        dw_ratio=factor(len(large[0]), outer[0]),
    )
    told = [
        key for key in measured if not (key == 'small_kernel' and is_deploy_form(state))
    ]
    if arch is None:
        same = (
            name
            for name, settings in named.items()
            if all(measured[key] == settings[key] for key in told)
        )
        arch = next(same, measured)
    # Each output has a norm.
    outputs = [i for i in range(len(counts)) if f'stages.{i}.norm.weight' in state]
    outputs = outputs or [len(counts) - 1]
    config = dict(type='mmrep.RepLKNet', arch=arch, out_indices=tuple(outputs))
    if (ratio := factor(hidden[0], outer[0])) != _FFN_RATIO:
        config['ffn_ratio'] = ratio
    stem = kernel(state, 'stem.0', 'conv')
    if stem.shape[1] != 3:
        config['in_channels'] = stem.shape[1]
    return config
