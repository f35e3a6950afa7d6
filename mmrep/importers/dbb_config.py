"""Read the architecture of a network of Diverse Branch Blocks from its weights."""

import re
from collections.abc import Mapping

from torch import Tensor

from mmrep.errors import CheckpointError
from mmrep.models.backbones import DBBMobileNetV1, DBBResNet

from .layout import Layout

#: ``DBBResNet``'s default ``base_channels`` and ``stem_channels``.
_BASE = 64
_RESNETS = {f'resnet{depth}': depth for depth in DBBResNet.arch_settings}


def dbb_config(
    state: Mapping[str, Tensor], layout: Layout, arch: str | None = None
) -> dict:
    """The config of the DBB network that has these weights.

    Args:
        state: The weights, under the backbone's keys.
        layout: Where they come from.
        arch: ``'mobilenet'``, or ``'resnet'`` and the depth. Default: None, which means
            the one of these shapes.

    Raises:
        CheckpointError: If the weights are those of no such network, or ``arch`` is
            unknown; says only that.
    """
    if arch not in (None, 'mobilenet', *_RESNETS):
        raise CheckpointError(
            f'arch {arch!r} is unknown; choose from mobilenet, {", ".join(_RESNETS)}'
        )
    mobilenet = any(key.startswith('stage_1.stem.') for key in state)
    if arch == 'mobilenet' or (arch is None and mobilenet):
        return _mobilenet_config(state)
    return _resnet_config(state, _RESNETS.get(arch))


def _mobilenet_config(state: Mapping[str, Tensor]) -> dict:
    outs, ins = _shape(state, 'stage_1.stem')
    config = dict(type='mmrep.DBBMobileNetV1', out_indices=(4,))
    if outs != DBBMobileNetV1.stem_channels:
        config['width_factor'] = outs / DBBMobileNetV1.stem_channels
    return _with_in_channels(config, ins)


def _resnet_config(state: Mapping[str, Tensor], depth: int | None) -> dict:
    if depth is None:
        depth = _depth(state)
    stem_channels, ins = _shape(state, 'conv1')
    config = dict(
        type='mmrep.DBBResNet',
        depth=depth,
        out_indices=(3,),
        style='pytorch',
        zero_init_residual=False,
    )
    base_channels, _ = _shape(state, 'layer1.0.conv1')
    if stem_channels != _BASE:
        config['stem_channels'] = stem_channels
    if base_channels != _BASE:
        config['base_channels'] = base_channels
    return _with_in_channels(config, ins)


def _with_in_channels(config: dict, in_channels: int) -> dict:
    return config if in_channels == 3 else {**config, 'in_channels': in_channels}


def _shape(state: Mapping[str, Tensor], unit: str) -> tuple[int, int]:
    """Output and input channels of a unit, in any form."""
    parts = ('', 'branch_kxk.conv.', 'branch_reparam.')
    for part in parts:
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
