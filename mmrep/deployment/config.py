"""Read configs of any OpenMMLab package, and derive the deploy config of one."""

import copy
import importlib.util
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, init_default_scope

from mmrep.errors import ConfigError, reason

Shape = tuple[int, int, int]

#: What to install for a default scope.
_HOSTS = {
    'mmpretrain': "pip install 'mmrep[pretrain]'",
    'mmseg': "pip install 'mmrep[seg]' and mmcv with its ops (not mmcv-lite)",
}

#: How transforms of a test pipeline name the size that they make.
_SIZE_KEYS = ('crop_size', 'scale', 'img_scale', 'size')


def read_config(path: str | Path, options: dict | None = None) -> Config:
    """Read a config, merge command-line options into it and enter its default scope.

    Args:
        path: The config file.
        options: What ``--cfg-options`` gave. Default: None.

    Raises:
        ConfigError: If the file is missing, cannot be read as a config, or needs a
            package that is not installed.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise ConfigError(f'config {path} is a folder: give a file in it')
    if not path.is_file():
        raise ConfigError(f'config {path} does not exist: check the path')
    try:
        cfg = Config.fromfile(path)
        if options:
            cfg.merge_from_dict(options)
    except Exception as error:
        # A config is a Python file and may raise anything.
        raise ConfigError(
            f'config {path} cannot be read ({reason(error)}): correct it'
        ) from error
    if not isinstance(cfg.get('model'), dict):
        raise ConfigError(f'config {path} has no model=dict(...): give one of a model')
    enter_scope(cfg)
    return cfg


def enter_scope(cfg: Config) -> None:
    """Make the config's default scope mmengine's, so that its bare names resolve.

    Raises:
        ConfigError: If the scope is a package that is not installed.
    """
    scope = cfg.get('default_scope') or 'mmengine'
    if importlib.util.find_spec(scope) is None:
        remedy = _HOSTS.get(scope, f'pip install {scope}')
        raise ConfigError(f'this config needs {scope}, which is not installed: {remedy}')
    init_default_scope(scope)


def model_nodes(cfg: Any) -> Iterator[ConfigDict]:
    """Every dict with a ``type`` inside a config, outer ones first."""
    if isinstance(cfg, dict):
        if 'type' in cfg:
            yield cfg
        for value in cfg.values():
            yield from model_nodes(value)
    elif isinstance(cfg, list | tuple):
        for value in cfg:
            yield from model_nodes(value)


def takes_deploy(node: dict) -> bool:
    """Whether a config's type is a re-parameterizable module with a deploy form."""
    module = node['type']
    if isinstance(module, str):
        module = MODELS.get(module)
    return inspect.isclass(module) and hasattr(module, 'switch_to_deploy')


def without_pretrained(model_cfg: ConfigDict) -> ConfigDict:
    """A copy of a model's config that loads no weights when it is initialized."""
    model_cfg = copy.deepcopy(model_cfg)
    nodes = [model_cfg, *model_nodes(model_cfg)]
    for node in nodes:
        if node.get('pretrained') is not None:
            node['pretrained'] = None
        init_cfg = node.get('init_cfg')
        if isinstance(init_cfg, dict) and init_cfg.get('type') == 'Pretrained':
            node['init_cfg'] = None
        elif isinstance(init_cfg, list | tuple):
            node['init_cfg'] = [
                entry for entry in init_cfg if entry.get('type') != 'Pretrained'
            ]
    return model_cfg


def for_one_process(model_cfg: ConfigDict) -> ConfigDict:
    """A copy of a model's config with ``BN`` for ``MMSyncBN``.

    mmcv's norm cannot be built outside a distributed job, where it is no other function,
    and has the same state-dict keys.
    """
    model_cfg = copy.deepcopy(model_cfg)
    for node in model_nodes(model_cfg):
        if node['type'] == 'MMSyncBN':
            node['type'] = 'BN'
            for own in ('group', 'stats_mode'):
                node.pop(own, None)
    return model_cfg


def deploy_config(cfg: Config) -> Config:
    """The config of the fused model: ``deploy=True`` wherever it belongs.

    Pretrained initializations and the checkpoint to start from are left out: they are of
    the train form.

    Raises:
        ConfigError: If nothing in the config's model has a deploy form.
    """
    deployed = copy.deepcopy(cfg)
    deployed.model = without_pretrained(deployed.model)
    nodes = [node for node in model_nodes(deployed.model) if takes_deploy(node)]
    if not nodes:
        raise ConfigError(
            'nothing in this config can be re-parameterized: give the config of a model '
            "with such a backbone, as type='mmrep.RepVGG'"
        )
    for node in nodes:
        node['deploy'] = True
    deployed.load_from = None
    deployed.resume = False
    return deployed


def input_shape(cfg: Config) -> Shape:
    """Channels, height and width of what the model sees in testing.

    The size is that of the data preprocessor, or the last one in the test pipeline, or
    224 x 224; the channels are the backbone's ``in_channels``, or 3.
    """
    model = cfg.get('model')
    model = model if isinstance(model, dict) else {}
    channels = (model.get('backbone') or {}).get('in_channels', 3)
    # Data preprocessors say height first, and mmcv's transforms width first.
    size = _pair((model.get('data_preprocessor') or {}).get('size'))
    for transform in reversed(_test_pipeline(cfg)):
        for key in _SIZE_KEYS:
            size = size or _pair(transform.get(key), width_first=True)
    return channels, *(size or (224, 224))


def _pair(size: Any, width_first: bool = False) -> tuple[int, int] | None:
    """Height and width, if ``size`` says both."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, list | tuple) and [type(pixels) for pixels in size] == [int, int]:
        return tuple(reversed(size) if width_first else size)
    return None


def _test_pipeline(cfg: Config) -> list[dict]:
    dataset = (cfg.get('test_dataloader') or {}).get('dataset') or {}
    while 'pipeline' not in dataset and 'dataset' in dataset:
        dataset = dataset['dataset']
    return [step for step in dataset.get('pipeline') or [] if isinstance(step, dict)]
