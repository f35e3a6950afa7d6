"""The models that a benchmark compares: a config's, and the same network elsewhere."""

import copy
import importlib.util
import inspect
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn

from mmrep.deployment import build_model, without_pretrained
from mmrep.reparam import has_running_statistics, switch_to_deploy


@dataclass
class BenchmarkModel:
    """A model that is measured.

    Args:
        name: Where it comes from: ``'mmrep'``, ``'mmpretrain'``, ``'timm'`` or
            ``'plain'``, the host's network without re-parameterization.
        train_form: The model as it is trained.
        deploy_form: The model as it is deployed.
    """

    name: str
    train_form: nn.Module
    deploy_form: nn.Module


def models_of(config: Config, device: str = 'cpu') -> list[BenchmarkModel]:
    """The model of a config and, as far as installed, its peers.

    The peers of RepVGG are mmpretrain's with the same weights and timm's of the same name;
    the peer of a ``DBBResNet`` is the host's ResNet.
    """
    torch.manual_seed(0)
    model = build_model(config)
    randomise_statistics(model)
    models = [BenchmarkModel('mmrep', model, _deployed(model)), *_peers(config, model)]
    for model in models:
        model.train_form.to(device)
        model.deploy_form.to(device)
    return models


@torch.no_grad()
def randomise_statistics(model: nn.Module) -> None:
    """Give every norm random statistics and affine parameters, as of a trained one."""
    for norm in model.modules():
        if has_running_statistics(norm):
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 2)
            if norm.weight is not None:
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.normal_(0, 0.1)


def _deployed(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    switch_to_deploy(model)
    return model


def _peers(config: Config, model: nn.Module) -> Iterator[BenchmarkModel]:
    backbone = config.model.get('backbone') or {}
    kind = MODELS.get(backbone.get('type', ''))
    name = getattr(kind, '__name__', '')
    if name == 'RepVGG' and kind.__module__.startswith('mmrep.'):
        peer = _with_backbone(config, 'mmpretrain', 'RepVGG')
        if peer is not None and isinstance(backbone['arch'], str):
            peer.load_state_dict(model.state_dict())
            yield BenchmarkModel('mmpretrain', peer, _deployed(peer))
        if importlib.util.find_spec('timm'):
            yield from _timm(f'repvgg_{backbone["arch"]}'.lower())
    elif name.startswith('DBBResNet'):
        host = config.get('default_scope')
        plain = _with_backbone(config, host, name.removeprefix('DBB'))
        if plain is not None:
            yield BenchmarkModel('plain', plain, plain)


def _with_backbone(config: Config, package: str, name: str) -> nn.Module | None:
    """The config's model with another package's backbone; ``None`` if that has none."""
    if importlib.util.find_spec(package) is None:
        return None
    model_cfg = without_pretrained(config.model)
    kind = MODELS.get(f'{package}.{name}')
    known = {
        key
        for cls in (kind or object).__mro__
        for key in inspect.signature(cls.__init__).parameters
    }
    options = {key: v for key, v in model_cfg.backbone.items() if key != 'type'}
    if kind is None or not options.keys() <= known:
        return None
    # A plain dict, since merging would keep keys of the old backbone.
    model_cfg['backbone'] = dict(options, type=f'{package}.{name}')
    return MODELS.build(model_cfg).eval()


def _timm(name: str) -> Iterator[BenchmarkModel]:
    import timm

    if name in timm.list_models('repvgg*'):
        model = timm.create_model(name).eval()
        randomise_statistics(model)
        yield BenchmarkModel('timm', model, timm.utils.model.reparameterize_model(model))
