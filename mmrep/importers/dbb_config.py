"""Read the architecture of a network of Diverse Branch Blocks from its weights."""

import re
from collections.abc import Mapping

from torch import Tensor

from mmrep.errors import CheckpointError
from mmrep.models.backbones import DBBMobileNetV1, DBBResNet

from .layout import Layout

#: Default arguments of the networks, which a config need not name.
_DEFAULTS = dict(stem_channels=64, base_channels=64, width_factor=1, in_channels=3)
_RESNETS = {f'resnet{depth}': depth for depth in DBBResNet.arch_settings}


def dbb_config(
    state: Mapping[str, Tensor], layout: Layout, arch: str | None = None
) -> dict:
    """The config of the DBB network that has these weights.

    Args:
        state: The weights, under the backbone's keys.
        layout: Where they come from.
        arch: ``'mobilenet'``, or ``'resnet'`` and the depth. Default: None, found from the
            shapes.

    Raises:
        CheckpointError: If the weights belong to no such network, or ``arch`` is
            unknown; the caller names the file.
    """
    if arch not in (None, 'mobilenet', *_RESNETS):
        raise CheckpointError(
            f'arch {arch!r} is unknown; choose from mobilenet, {", ".join(_RESNETS)}'
        )
    mobilenet = any(key.startswith('stage_1.stem.') for key in state)
    if arch == 'mobilenet' or (arch is None and mobilenet):
        outs, ins = _shape(state, 'stage_1.stem')
        config = dict(
            type='mmrep.DBBMobileNetV1',
            out_indices=(4,),
            width_factor=outs / DBBMobileNetV1.stem_channels,
            in_channels=ins,
        )
    else:
        depth = _RESNETS[arch] if arch else _depth(state)
        outs, ins = _shape(state, 'conv1')
        config = dict(
            type='mmrep.DBBResNet',
            depth=depth,
            out_indices=(3,),
            style='pytorch',
            zero_init_residual=False,
            stem_channels=outs,
            base_channels=_shape(state, 'layer1.0.conv1')[0],
            in_channels=ins,
        )
    return {key: value for key, value in config.items() if _DEFAULTS.get(key) != value}


def _shape(state: Mapping[str, Tensor], unit: str) -> tuple[int, int]:
    """Output and input channels of a unit, in any form."""
    for part in ('', 'branch_kxk.conv.', 'branch_reparam.'):
        weight = state.get(f'{unit}.{part}weight')
        if weight is not None and weight.dim() == 4:
            return weight.shape[0], weight.shape[1]
    raise CheckpointError(f"the weight of mmrep's {unit} is missing")


def _depth(state: Mapping[str, Tensor]) -> int:
    """The depth of a ResNet, by its numbers of blocks and whether they are bottlenecks."""
    found = {m.groups() for m in map(re.compile(r'layer(\d)\.(\d+)\.').match, state) if m}
    counts = tuple(sum(layer == str(i) for layer, _ in found) for i in range(1, 5))
    expansion = 4 if any('.conv3.' in key for key in state) else 1
    for depth, (block, blocks) in DBBResNet.arch_settings.items():
        if blocks == counts and block.expansion == expansion:
            return depth
    kind = 'basic blocks' if expansion == 1 else 'bottlenecks'
    raise CheckpointError(f'no ResNet has {counts} {kind} in its stages')
