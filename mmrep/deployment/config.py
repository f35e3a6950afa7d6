"""Read configs of any OpenMMLab package, and derive the deploy config of one."""

import copy
import importlib.util
import inspect
import operator
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmengine import registry
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, DefaultScope, Registry, init_default_scope

from mmrep.errors import ConfigError, printable, reason
from mmrep.expansion import CONV_LAYERS, build_expanded
from mmrep.registry import HOOKS, OPTIM_WRAPPER_CONSTRUCTORS, SCOPE

Shape = tuple[int, int, int]

#: What to install for a default scope.
_HOSTS = {
    'mmpretrain': "pip install 'mmrep[pretrain]', or onedl-mmpretrain beside onedl-mmcv",
    'mmseg': "pip install 'mmrep[seg]' and mmcv with its ops (not mmcv-lite), or "
    'onedl-mmsegmentation beside onedl-mmcv',
    'mmdet': "pip install 'mmrep[det]' and mmcv with its ops (not mmcv-lite), or "
    'onedl-mmdetection beside onedl-mmcv',
}

#: What a path can be that is no file.
_KINDS = {
    stat.S_IFDIR: 'a folder: give a file in it',
    stat.S_IFIFO: 'a named pipe: give a file',
    stat.S_IFSOCK: 'a socket: give a file',
    stat.S_IFCHR: 'a device: give a file',
    stat.S_IFBLK: 'a device: give a file',
}

#: How transforms of a test pipeline name the size that they make.
_SIZE_KEYS = ('crop_size', 'scale', 'img_scale', 'size')

#: Initializers that read a file, by name and as classes.
_FROM_FILES = ('Pretrained', 'PretrainedInit', 'SearchedScales', 'SearchedScalesInit')

#: The type of a model that is switched after it is built.
DEPLOYED = f'{SCOPE}.Deployed'

#: How constructors call the argument that asks for the deploy form; RepLKNet's the second.
_DEPLOY_ARGUMENTS = ('deploy', 'small_kernel_merged')


def read_config(
    path: str | Path, options: dict | None = None, needed: Sequence[str] = ()
) -> Config:
    """Read a config, merge command-line options into it and enter its default scope.

    It may build on one of mmrep's: ``_base_ = 'mmrep::repvgg/repvgg-a0_8xb32_in1k.py'``.

    A config is a Python file and may raise anything; that is the config's fault, whatever
    it is, ``SystemExit`` included. ``KeyboardInterrupt`` alone goes through: nobody can
    tell a config's own from that of a user who waits for a config that does not end.

    Args:
        path: The config file.
        options: What ``--cfg-options`` gave. Default: None.
        needed: Names of the dicts that it must have besides ``model``. Default: none.

    Raises:
        ConfigError: If the file is missing, cannot be read as a config, lacks an entry,
            or needs a package that is not installed.
    """
    path = Path(path).expanduser()
    _refuse_unreadable(path)
    try:
        cfg = Config.fromfile(path)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise ConfigError(
            f'config {path} cannot be read ({reason(error)}): correct it'
        ) from error
    _leave_scope(cfg, SCOPE)
    try:
        cfg.merge_from_dict(options or {})
    except Exception as error:
        raise ConfigError(
            f'--cfg-options do not fit config {path} ({reason(error)}): correct them'
        ) from error
    for name in ('model', *needed):
        if not isinstance(cfg.get(name), dict):
            raise ConfigError(f'config {path} has no {name}=dict(...): give one with it')
    enter_scope(cfg)
    return cfg


def _leave_scope(cfg: Any, scope: str) -> None:
    """Remove a scope that mmengine notes in every dict of a ``_base_`` from a package.

    Those of mmrep are configs of a host, whose names are in its scope.
    """
    if isinstance(cfg, Config | dict):
        if cfg.get('_scope_') == scope:
            del cfg['_scope_']
        cfg = list(cfg.values())
    if isinstance(cfg, list | tuple):
        for value in cfg:
            _leave_scope(value, scope)


def _refuse_unreadable(path: Path) -> None:
    """Raise a ``ConfigError`` that says why a path is no file that can be opened.

    Reading a pipe would wait for one who writes.
    """
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = _KINDS.get(stat.S_IFMT(mode), 'no file: give one')
            raise ConfigError(f'config {path} is {kind}')
        path.open('rb').close()
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f'config {path} does not exist: check the path') from None
    except PermissionError:
        raise ConfigError(
            f'config {path} may not be read by this user: change its permissions'
        ) from None
    except (OSError, ValueError) as error:
        # A name that is too long, or has a character that no name can have.
        raise ConfigError(
            f'config {path} cannot be opened ({reason(error)}): check the path'
        ) from None


def enter_scope(cfg: Config) -> None:
    """Make the config's default scope mmengine's, so that its bare names resolve.

    Raises:
        ConfigError: If the scope is a package that is not installed.
    """
    scope = cfg.get('default_scope') or 'mmengine'
    if not (isinstance(scope, str) and scope.isidentifier()):
        raise ConfigError(
            f'default_scope={printable(repr(scope), 200)} is no name of a package: give '
            "one as 'mmpretrain'"
        )
    if importlib.util.find_spec(scope) is None:
        remedy = _HOSTS.get(scope, f'pip install {scope}')
        raise ConfigError(f'this config needs {scope}, which is not installed: {remedy}')
    init_default_scope(scope)


def model_nodes(cfg: Any) -> Iterator[ConfigDict]:
    """Every dict with a ``type`` inside a config, outer ones first."""
    return (node for _, node in named_nodes(cfg))


def named_nodes(cfg: Any, name: str = '') -> Iterator[tuple[str, ConfigDict]]:
    """:func:`model_nodes`, and how ``--cfg-options`` names each."""
    if isinstance(cfg, dict):
        if 'type' in cfg:
            yield name, cfg
        items = cfg.items()
    else:
        items = enumerate(cfg) if isinstance(cfg, list | tuple) else ()
    for key, value in items:
        yield from named_nodes(value, f'{name}.{key}' if name else str(key))


def unknown_type(cfg: Any, name: str = '') -> str:
    """The first type inside a config that no registry knows, in words; '' if all are known.

    Args:
        cfg: The config.
        name: What its place is called. Default: ''.
    """
    for place, node in named_nodes(cfg, name):
        kind = node['type']
        if isinstance(kind, str) and not _is_known(kind):
            key = f'{place}.type' if place else 'type'
            return f'{key}={printable(repr(kind), 200)} is unknown to {current_scope()}'
    return ''


def _is_known(kind: str) -> bool:
    for root in vars(registry).values():
        if isinstance(root, Registry):
            # The host has not every registry.
            scoped = root.children.get(current_scope(), root)
            try:
                if scoped.get(kind) is not None:
                    return True
            except Exception:
                # A module that cannot be imported, or a dotted name of none.
                continue
    return False


def current_scope() -> str:
    """The package whose types need no prefix; see :func:`enter_scope`."""
    scope = DefaultScope.get_current_instance()
    return scope.scope_name if scope else 'mmengine'


def deploy_argument(node: dict) -> str | None:
    """The argument by which a config's type is built in deploy form, if it has one."""
    kind = _switchable_class(node)
    known = arguments(kind) if kind else ()
    return next((name for name in _DEPLOY_ARGUMENTS if name in known), None)


def arguments(kind: type) -> dict[str, inspect.Parameter]:
    """What a class can be built with, by name; classes pass on what they do not name."""
    found: dict[str, inspect.Parameter] = {}
    for base in kind.__mro__:
        parameters = inspect.signature(base.__init__).parameters
        found = {**parameters, **found}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            break
    of_no_name = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {
        name: parameter
        for name, parameter in found.items()
        if name != 'self' and parameter.kind not in of_no_name
    }


def is_deploy_config(cfg: Config) -> bool:
    """Whether all that has a deploy form is built in it."""
    nodes = [node for node in model_nodes(cfg.model) if _switchable_class(node)]
    return bool(nodes) and all(node.get(deploy_argument(node) or '') for node in nodes)


def _switchable_class(node: dict) -> type | None:
    module = registered(node)
    switchable = inspect.isclass(module) and hasattr(module, 'switch_to_deploy')
    return module if switchable else None


def registered(node: dict) -> Any:
    """What the type of a config's node stands for; ``None`` if it is unknown."""
    module = node['type']
    if isinstance(module, str):
        with MODELS.switch_scope_and_registry(None) as models:
            module = models.get(module)
    return module


def without_pretrained(model_cfg: ConfigDict) -> ConfigDict:
    """A copy of a model's config that loads no weights when it is initialized."""
    model_cfg = copy.deepcopy(model_cfg)
    nodes = [model_cfg, *model_nodes(model_cfg)]
    for node in nodes:
        if node.get('pretrained') is not None:
            node['pretrained'] = None
        init_cfg = node.get('init_cfg')
        if _reads_a_file(init_cfg):
            node['init_cfg'] = None
        elif isinstance(init_cfg, list | tuple):
            node['init_cfg'] = [entry for entry in init_cfg if not _reads_a_file(entry)]
    return model_cfg


def _reads_a_file(init_cfg: Any) -> bool:
    is_dict = isinstance(init_cfg, dict)
    return is_dict and _class_name(dict.get(init_cfg, 'type')) in _FROM_FILES


def _class_name(kind: Any) -> str:
    """What a type is called without its scope; '' for none."""
    name = kind.__name__ if inspect.isclass(kind) else kind
    return name.rpartition('.')[2] if isinstance(name, str) else ''


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


def is_expanded(cfg: Config) -> bool:
    """Whether blocks stand for convs in the config's model."""
    return any(_is_expansion(node) for node in model_nodes(cfg.model))


def _is_expansion(node: dict) -> bool:
    return registered(node) in (build_expanded, *CONV_LAYERS)


def _plain(value: Any) -> Any:
    """A part of a model's config, with no block that stands for a conv; in place."""
    if isinstance(value, list | tuple):
        entries = [_plain(entry) for entry in value]
        same = all(map(operator.is_, entries, value))
        return value if same else type(value)(entries)
    if not isinstance(value, dict):
        return value
    if 'type' in value and _is_expansion(value):
        if 'expand' not in value:
            return _plain(value.get('conv_cfg'))
        # As it is in the config: where types are imported, ConfigDict's own methods would
        # give the class, which cannot be written.
        value['type'] = dict.pop(value.pop('expand'), 'of')
    for key, entry in value.items():
        plain = _plain(entry)
        if plain is not entry:
            value[key] = plain
    return value


def _is_ours(node: dict) -> bool:
    module = getattr(registered(node), '__module__', None)
    return str(module).partition('.')[0] == SCOPE


def _without_ours(cfg: Config) -> None:
    """Leave out of a config what concerns blocks and is not of its model; in place."""
    names = {*HOOKS.module_dict, *OPTIM_WRAPPER_CONSTRUCTORS.module_dict}

    def ours(value: Any) -> bool:
        kind = value.get('type') if isinstance(value, dict) else value
        if inspect.isclass(kind):
            kind = kind.__module__
        if not isinstance(kind, str):
            return False
        return kind in names or kind.partition('.')[0] == SCOPE

    def others(values: Any) -> Any:
        if isinstance(values, dict):
            return {key: value for key, value in values.items() if not ours(value)}
        values = [values] if isinstance(values, str) else values or ()
        return [value for value in values if not ours(value)]

    for owner, name in (
        (cfg, 'custom_hooks'),
        (cfg, 'default_hooks'),
        (_dict_in(cfg, 'custom_imports'), 'imports'),
    ):
        if name in owner:
            owner[name] = others(owner[name])
    wrapper = _dict_in(cfg, 'optim_wrapper')
    if ours(wrapper.get('constructor')):
        del wrapper['constructor']


def deploy_config(cfg: Config) -> Config:
    """The config of the fused model: ``deploy=True`` wherever it belongs.

    Pretrained initializations, the checkpoint to start from and RepOptimizer are left out:
    they are of the train form. Where blocks stand for convs of a host's model, it is that
    model's config. Where nothing in the model is of mmrep then, there is no word of mmrep
    in it. Where a class has no argument for its deploy form, ``mmrep.Deployed`` builds the
    model.

    Raises:
        ConfigError: If a type in the config's model is unknown.
    """
    deployed = copy.deepcopy(cfg)
    expanded = is_expanded(cfg)
    deployed.model = without_pretrained(_plain(deployed.model))
    nodes = [node for node in model_nodes(deployed.model) if _switchable_class(node)]
    wrapper = _dict_in(deployed, 'optim_wrapper')
    if _class_name(wrapper.get('constructor')) == 'RepOptimizerConstructor':
        # What is fused has no scaled branches to learn as.
        del wrapper['constructor']
        wrapper.pop('scales', None)
    if not any(_is_ours(node) for node in model_nodes(deployed.model)):
        _without_ours(deployed)
    for node in nodes:
        if argument := deploy_argument(node):
            node[argument] = True
    if not (nodes or expanded) or not all(map(deploy_argument, nodes)):
        # There may be blocks in what it builds.
        if unknown := unknown_type(cfg.model, 'model'):
            raise ConfigError(
                f'the model of this config cannot be built ({unknown}): correct it'
            )
        of = dict.get(deployed.model, 'type')
        deployed.model.update(type=DEPLOYED, of=of)
    deployed.load_from = None
    deployed.resume = False
    return deployed


def input_shape(cfg: Config) -> Shape:
    """Channels, height and width of what the model sees in testing.

    The size is that of the data preprocessor, or the last one in the test pipeline, or
    224 x 224; the channels are the backbone's ``in_channels``, or 3.
    """
    model = _dict_in(cfg, 'model')
    channels = _dict_in(model, 'backbone').get('in_channels', 3)
    # Data preprocessors say height first, and mmcv's transforms width first.
    size = _pair(_dict_in(model, 'data_preprocessor').get('size'))
    for transform in reversed(_test_pipeline(cfg)):
        for key in _SIZE_KEYS:
            size = size or _pair(transform.get(key), width_first=True)
    return channels, *(size or (224, 224))


def _dict_in(cfg: Config | dict, name: str) -> dict:
    """An entry that is a dict; an empty one where there is none."""
    value = cfg.get(name)
    return value if isinstance(value, dict) else {}


def _pair(size: Any, width_first: bool = False) -> tuple[int, int] | None:
    """Height and width, if ``size`` says both."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, list | tuple) and [type(pixels) for pixels in size] == [int, int]:
        return tuple(reversed(size) if width_first else size)
    return None


def _test_pipeline(cfg: Config) -> list[dict]:
    dataset = _dict_in(_dict_in(cfg, 'test_dataloader'), 'dataset')
    while 'pipeline' not in dataset and 'dataset' in dataset:
        dataset = _dict_in(dataset, 'dataset')
    steps = dataset.get('pipeline')
    steps = steps if isinstance(steps, list | tuple) else []
    return [step for step in steps if isinstance(step, dict)]
