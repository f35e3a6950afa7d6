"""Build the network of a shipped config by its name."""

from pathlib import Path

from mmengine.config import Config
from torch import nn

from mmrep.checkpoints import is_deploy_form, load_strictly, read_checkpoint, state_dict_of
from mmrep.deployment import (
    build_model,
    config_of,
    deploy_config,
    enter_scope,
    read_config,
    without_pretrained,
)
from mmrep.hosts import quiet
from mmrep.registry import MODELS
from mmrep.reparam import switch_to_deploy


def get_model(
    name: str,
    checkpoint: str | Path | None = None,
    deploy: bool = False,
    backbone_only: bool = False,
) -> nn.Module:
    """Build a network of a shipped config, in eval mode.

    Args:
        name: One of :func:`list_models`. For an ImageNet-1k classifier the beginning is
            enough: ``'repvgg-a0'`` for ``'repvgg-a0_8xb32_in1k'``.
        checkpoint: Its weights, in train or deploy form, as ``tools/train.py``,
            ``tools/reparam.py`` and ``tools/convert_checkpoint.py`` write them.
            Default: None, the random weights that the config starts training with;
            pretrained weights are not downloaded.
        deploy: Whether to fuse it. Default: False.
        backbone_only: Whether to build the backbone alone, which needs no host (mmpretrain
            or mmsegmentation). Default: False.

    Raises:
        UserError: If there is no such network, its host is not installed, or the
            checkpoint does not fit it.
    """
    path = config_of(name)
    if backbone_only:
        config = Config.fromfile(path)
        with quiet():
            enter_scope(Config())
    else:
        config = read_config(path)
    state_dict = {}
    if checkpoint is not None:
        state_dict = state_dict_of(read_checkpoint(checkpoint), checkpoint)
        if backbone_only:
            state_dict = _of_backbone(state_dict)
        if is_deploy_form(state_dict):
            config, deploy = deploy_config(config), True
    if backbone_only:
        model = MODELS.build(without_pretrained(config.model.backbone))
    else:
        model = build_model(config)
    if checkpoint is None:
        with quiet():
            model.init_weights()
    else:
        load_strictly(model, state_dict, checkpoint)
    model.eval()
    if deploy:
        switch_to_deploy(model)
    return model


def _of_backbone(state_dict: dict) -> dict:
    """The entries of the backbone without their prefix, or all if none has the prefix."""
    prefix = 'backbone.'
    own = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
    return own or state_dict
