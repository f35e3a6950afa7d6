"""Replace mmrep's bodies in a config by the equivalent ones of the hosts."""

import copy
import inspect
from collections.abc import Container, Mapping
from typing import Any, NamedTuple

from mmengine.config import Config, ConfigDict
from torch import Tensor

from mmrep.errors import ConfigError
from mmrep.models.backbones import (
    DBBVGG,
    DBBResNet,
    DBBResNetV1c,
    DBBResNetV1d,
    MobileOne,
    ReparamResNet,
    RepLKNet,
    RepVGG,
)
from mmrep.models.backbones.base import ReparamBackbone, stage_indices
from mmrep.models.blocks import LargeKernelBlock, MobileOneBlock, RepVGGBlock
from mmrep.registry import SCOPE

from .config import arguments, current_scope, model_nodes, named_nodes, registered

#: The hosts' names of the equivalent bodies.
_BODIES = {
    MobileOne: 'MobileOne',
    RepLKNet: 'RepLKNet',
    RepVGG: 'RepVGG',
    ReparamResNet: 'ResNet',
    DBBResNet: 'ResNet',
    DBBResNetV1c: 'ResNetV1c',
    DBBResNetV1d: 'ResNetV1d',
    DBBVGG: 'VGG',
}

#: The blocks that the host's body has itself, with the same state-dict keys.
_BLOCKS = {
    MobileOne: MobileOneBlock,
    RepLKNet: LargeKernelBlock,
    RepVGG: RepVGGBlock,
}

#: Arguments that the host's body takes but ignores, and the value it uses in every stage.
_UNREAD = {
    RepLKNet: dict(
        strides=2,
        dilations=1,
        conv_cfg=None,
        norm_cfg=dict(type='BN'),
        act_cfg=dict(type='ReLU'),
    )
}

#: Arguments about the blocks, which are never passed to a host's body.
_OF_BLOCKS = ('block_cfg', 'reparam_kernels', 'deploy')

#: Arguments that matter in training only: a body without them computes the same.
_OF_TRAINING = ('with_cp', 'init_cfg')


class HostConfig(NamedTuple):
    """A config with the bodies of a host.

    Args:
        config: The config. Its bodies are expanded, or have the host's own blocks.
        names: For prefixes of the names of modules in mmrep's model, those in the host's,
            where they differ.
    """

    config: Config
    names: Mapping[str, str]

    def renamed(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of mmrep's model with the keys of the host's."""
        return {self._renamed(key): value for key, value in state_dict.items()}

    def _renamed(self, key: str) -> str:
        for old, new in self.names.items():
            if key.startswith(old):
                return new + key.removeprefix(old)
        return key


def host_config(cfg: Config) -> HostConfig:
    """A copy of a config with mmrep's bodies replaced by the same networks of a host.

    ``RepVGG``, ``MobileOne`` and ``RepLKNet`` become mmpretrain's; a ``DBBResNet`` becomes
    the ``ResNet`` of the config's host, expanded with the same blocks, and a ``DBBVGG``
    mmpretrain's ``VGG``.

    Raises:
        ConfigError: If no host has the body, or if an argument has no counterpart.
    """
    config = copy.deepcopy(cfg)
    names: dict[str, str] = {}
    for place, node in list(named_nodes(config.model)):
        kind = registered(node)
        if inspect.isclass(kind) and kind in _BODIES:
            host = _to_host(node, kind)
            prefix = f'{place}.' if place else ''
            names |= {
                f'{prefix}{old}.': f'{prefix}{new}.'
                for old, new in _other_names(node, kind, host).items()
            }
    for node in model_nodes(config.model):
        kind = registered(node)
        if inspect.isclass(kind) and issubclass(kind, ReparamBackbone):
            raise ConfigError(f'no host has a body like {node["type"]}: leave --host out')
    return HostConfig(config, names)


def _to_host(node: ConfigDict, kind: type) -> type:
    """Replace a body of mmrep in a config, in place; returns the host's class."""
    of, host = _host_body(_BODIES[kind])
    mine, theirs = arguments(kind), arguments(host)
    values = {name: p.default for name, p in mine.items() if p.default is not p.empty}
    # dict.items gives types as the config has them; ConfigDict's would give classes.
    values.update((key, value) for key, value in dict.items(node) if key != 'type')
    own_block, block_cfg = _BLOCKS.get(kind), values['block_cfg']
    norm_cfg = values.get('norm_cfg')
    if own_block is not None and norm_cfg and norm_cfg['type'] == 'SyncBN':
        # The same keys. mmpretrain's blocks fuse BN only; fused, they have no norm.
        values['norm_cfg'] = dict(norm_cfg, type='BN')
    defaults = {name: parameter.default for name, parameter in mine.items()}
    if unknown := _unknown(kind, values, defaults, theirs):
        raise ConfigError(
            f'{of} has no counterpart of {", ".join(unknown)} of {node["type"]}: leave '
            '--host out'
        )
    # Write ours where the defaults differ; None stands for the default of the body.
    given = {
        name: value
        for name, value in values.items()
        if name in theirs and name not in _OF_BLOCKS
        if name in node
        or (name != 'init_cfg' and value not in (None, theirs[name].default))
    }
    if kind is MobileOne and isinstance(given['arch'], dict):
        # mmpretrain takes only lists there.
        given['arch'] = {name: list(value) for name, value in given['arch'].items()}
    if kind is RepLKNet:
        # mmpretrain's takes no negative indices, and not more stages than there are.
        arch = RepLKNet.arch_settings.get(str(given['arch']), given['arch'])
        stages = len(arch['layers'])
        given['out_indices'] = stage_indices(values['out_indices'], stages)
        given['frozen_stages'] = min(values['frozen_stages'], stages)
    node.clear()
    if own_block is not None or block_cfg is None:
        node.update(given, type=of)
    else:
        sizes = values['reparam_kernels']
        expand = dict(of=of, block=block_cfg, kernel_sizes=sizes)
        node.update(given, type=f'{SCOPE}.Expanded', expand=expand)
    return host


def _unknown(
    kind: type,
    values: Mapping[str, Any],
    defaults: Mapping[str, Any],
    theirs: Container[str],
) -> list[str]:
    """The arguments of a body that the host's body has no counterpart of."""
    unread, own_block = _UNREAD.get(kind, {}), _BLOCKS.get(kind)
    names = [name for name in unread if not _is_that(values[name], unread[name])]
    names += [
        name
        for name, value in values.items()
        if not (name in theirs or name in _OF_BLOCKS or name in _OF_TRAINING)
        if value != defaults[name]
    ]
    if own_block is not None:
        if values['block_cfg'] != dict(type=f'{SCOPE}.{own_block.__name__}'):
            names.append('block_cfg')
        sizes = values.get('reparam_kernels', ())
        if sizes and set(sizes) != set(defaults['reparam_kernels']):
            names.append('reparam_kernels')
    return [f'{name}={values[name]!r}' for name in names]


def _is_that(value: Any, own: Any) -> bool:
    """Whether an argument, or each of its entries, equals the value of the host's body."""
    if isinstance(value, list | tuple):
        return set(value) == {own}
    if isinstance(value, dict):
        # These two matter in training only.
        value = {k: v for k, v in value.items() if k not in ('requires_grad', 'momentum')}
    return value == own


def _host_body(name: str) -> tuple[str, type]:
    """The type by which a config names a host's class, and the class."""
    for scoped in (name, f'mmpretrain.{name}'):
        kind = registered(dict(type=scoped))
        if inspect.isclass(kind) and not issubclass(kind, ReparamBackbone):
            return scoped, kind
    raise ConfigError(
        f'neither {current_scope()} nor mmpretrain has a {name}: install mmpretrain, or '
        'leave --host out'
    )


def _other_names(node: ConfigDict, kind: type, host: type) -> dict[str, str]:
    """The host's names of modules, by our names, where they differ."""
    if kind is DBBVGG:
        return _vgg_names(node.depth)
    if issubclass(kind, ReparamResNet) and host.__module__.startswith('mmpretrain.'):
        return _resnet_names(node, kind)
    return {}


def _vgg_names(depth: int) -> dict[str, str]:
    """mmpretrain's ``VGG`` numbers its convs and poolings through all stages."""
    names: dict[str, str] = {}
    place = 0
    for stage, convs in enumerate(DBBVGG.arch_settings[depth], start=1):
        for conv in range(convs):
            names[f'stage_{stage}.{conv}'] = f'features.{place + conv}.conv'
        place += convs + 1
    return names


def _resnet_names(node: ConfigDict, kind: type) -> dict[str, str]:
    """mmpretrain's ``ResNet`` has a stem of ``ConvModule``, and no pooling of stride 1."""
    names: dict[str, str] = {}
    if node.get('deep_stem', kind in (DBBResNetV1c, DBBResNetV1d)):
        for unit in range(3):
            names[f'stem.{3 * unit}'] = f'stem.{unit}.conv'
    if node.get('avg_down', kind is DBBResNetV1d):
        strides = node.get('strides', arguments(kind)['strides'].default)
        for stage, stride in enumerate(strides, start=1):
            if stride == 1:
                shortcut = f'layer{stage}.0.downsample'
                names |= {
                    f'{shortcut}.1': f'{shortcut}.0',
                    f'{shortcut}.2': f'{shortcut}.1',
                }
    return names
