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
from mmrep.registry import HOOKS, OPTIM_WRAPPER_CONSTRUCTORS, SCOPE, VISBACKENDS

Shape = tuple[int, int, int]

#: What to install for a default scope.
_HOSTS = {
    'mmpretrain': "pip install 'mmrep[pretrain]', or onedl-mmpretrain beside onedl-mmcv",
    'mmseg': "pip install 'mmrep[seg]' and mmcv with its ops (not mmcv-lite), or "
    'onedl-mmsegmentation beside onedl-mmcv',
    'mmdet': "pip install 'mmrep[det]' and mmcv with its ops (not mmcv-lite), or "
    'onedl-mmdetection beside onedl-mmcv',
}

#: What a path that is not a regular file can be, by its type.
_KINDS = {
    stat.S_IFDIR: 'a folder: give a file in it',
    stat.S_IFIFO: 'a named pipe: give a file',
    stat.S_IFSOCK: 'a socket: give a file',
    stat.S_IFCHR: 'a device: give a file',
    stat.S_IFBLK: 'a device: give a file',
}

#: Arguments by which transforms of a test pipeline set the size of the image.
_SIZE_KEYS = ('crop_size', 'scale', 'img_scale', 'size')

#: Initializers that read a file: registered names and class names.
_FROM_FILES = ('Pretrained', 'PretrainedInit', 'SearchedScales', 'SearchedScalesInit')

#: The type of a model that is switched to deploy form after it is built.
DEPLOYED = f'{SCOPE}.Deployed'

#: Arguments of constructors that ask for the deploy form; the second is that of RepLKNet.
_DEPLOY_ARGUMENTS = ('deploy', 'small_kernel_merged')


def read_config(
    path: str | Path, options: dict | None = None, needed: Sequence[str] = ()
) -> Config:
    """Read a config, merge command-line options into it and enter its default scope.

    The config may inherit from a shipped one, as
    ``_base_ = 'mmrep::repvgg/repvgg-a0_8xb32_in1k.py'``.

    A config is a Python file and may raise anything, ``SystemExit`` included; each becomes
    a ``ConfigError``. Only ``KeyboardInterrupt`` passes through, since it may come from a
    user who stops a config that hangs.

    Args:
        path: The config file.
        options: What ``--cfg-options`` gave. Default: None.
        needed: Names of the dicts that the config must have besides ``model``.
            Default: none.

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
    """Remove the ``_scope_`` that mmengine adds to every dict of a package's ``_base_``.

    The types in mmrep's configs are names in the scope of a host, not of mmrep.
    """
    if isinstance(cfg, Config | dict):
        if cfg.get('_scope_') == scope:
            del cfg['_scope_']
        cfg = list(cfg.values())
    if isinstance(cfg, list | tuple):
        for value in cfg:
            _leave_scope(value, scope)


def _refuse_unreadable(path: Path) -> None:
    """Raise a ``ConfigError`` if a path is not a regular file that can be opened.

    Reading a named pipe would block until something writes to it.
    """
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = _KINDS.get(stat.S_IFMT(mode), 'not a file: give one')
            raise ConfigError(f'config {path} is {kind}')
        path.open('rb').close()
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f'config {path} does not exist: check the path') from None
    except PermissionError:
        raise ConfigError(
            f'config {path} may not be read by this user: change its permissions'
        ) from None
    except (OSError, ValueError) as error:
        # The name is too long, or has an invalid character.
        raise ConfigError(
            f'config {path} cannot be opened ({reason(error)}): check the path'
        ) from None


def enter_scope(cfg: Config) -> None:
    """Make the config's default scope the current one, so that names without scope resolve.

    Raises:
        ConfigError: If the scope is a package that is not installed.
    """
    scope = cfg.get('default_scope') or 'mmengine'
    if not (isinstance(scope, str) and scope.isidentifier()):
        raise ConfigError(
            f'default_scope={printable(repr(scope), 200)} is not the name of a package: '
            "give one, as 'mmpretrain'"
        )
    if importlib.util.find_spec(scope) is None:
        remedy = _HOSTS.get(scope, f'pip install {scope}')
        raise ConfigError(f'this config needs {scope}, which is not installed: {remedy}')
    init_default_scope(scope)


def model_nodes(cfg: Any) -> Iterator[ConfigDict]:
    """Iterate over every dict with a ``type`` in a config, outer ones first."""
    return (node for _, node in named_nodes(cfg))


def named_nodes(cfg: Any, name: str = '') -> Iterator[tuple[str, ConfigDict]]:
    """:func:`model_nodes`, each with its dotted key as in ``--cfg-options``."""
    if isinstance(cfg, dict):
        if 'type' in cfg:
            yield name, cfg
        items = cfg.items()
    else:
        items = enumerate(cfg) if isinstance(cfg, list | tuple) else ()
    for key, value in items:
        yield from named_nodes(value, f'{name}.{key}' if name else str(key))


def unknown_type(cfg: Any, name: str = '') -> str:
    """Describe the first type in a config that no registry knows; '' if all are known.

    Args:
        cfg: The config.
        name: The dotted key of ``cfg`` itself. Default: ''.
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
            # A host does not have every registry.
            scoped = root.children.get(current_scope(), root)
            try:
                if scoped.get(kind) is not None:
                    return True
            except Exception:
                # Its module does not exist or cannot be imported.
                continue
    return False


def current_scope() -> str:
    """The package whose types need no prefix; see :func:`enter_scope`."""
    scope = DefaultScope.get_current_instance()
    return scope.scope_name if scope else 'mmengine'


def deploy_argument(node: dict) -> str | None:
    """The argument that asks a node's type for its deploy form, if it has one."""
    kind = _switchable_class(node)
    known = arguments(kind) if kind else ()
    return next((name for name in _DEPLOY_ARGUMENTS if name in known), None)


def arguments(kind: type) -> dict[str, inspect.Parameter]:
    """The arguments of a class by name, with those that it passes to its bases."""
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
    """Whether every type that has a deploy form is built in deploy form."""
    nodes = [node for node in model_nodes(cfg.model) if _switchable_class(node)]
    return bool(nodes) and all(node.get(deploy_argument(node) or '') for node in nodes)


def _switchable_class(node: dict) -> type | None:
    module = registered(node)
    switchable = inspect.isclass(module) and hasattr(module, 'switch_to_deploy')
    return module if switchable else None


def registered(node: dict) -> Any:
    """The class or function that a node's ``type`` names; ``None`` if it is unknown."""
    module = node['type']
    if isinstance(module, str):
        with MODELS.switch_scope_and_registry(None) as models:
            module = models.get(module)
    return module


def without_pretrained(model_cfg: ConfigDict) -> ConfigDict:
    """A copy of a model's config whose initialization loads no weights."""
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
    """The name of a type without its scope; '' if there is no type."""
    name = kind.__name__ if inspect.isclass(kind) else kind
    return name.rpartition('.')[2] if isinstance(name, str) else ''


def for_one_process(model_cfg: ConfigDict) -> ConfigDict:
    """A copy of a model's config with ``BN`` in place of ``MMSyncBN``.

    mmcv's ``MMSyncBN`` cannot be built outside a distributed job. In a single process
    ``BN`` is the same function, with the same state-dict keys.
    """
    model_cfg = copy.deepcopy(model_cfg)
    for node in model_nodes(model_cfg):
        if node['type'] == 'MMSyncBN':
            node['type'] = 'BN'
            for own in ('group', 'stats_mode'):
                node.pop(own, None)
    return model_cfg


def is_expanded(cfg: Config) -> bool:
    """Whether the config's model has blocks in the place of convs."""
    return any(_is_expansion(node) for node in model_nodes(cfg.model))


def _is_expansion(node: dict) -> bool:
    return registered(node) in (build_expanded, *CONV_LAYERS)


def _plain(value: Any) -> Any:
    """Undo the expansion of a part of a model's config, in place; returns the part."""
    if isinstance(value, list | tuple):
        entries = [_plain(entry) for entry in value]
        same = all(map(operator.is_, entries, value))
        return value if same else type(value)(entries)
    if not isinstance(value, dict):
        return value
    if 'type' in value and _is_expansion(value):
        if 'expand' not in value:
            return _plain(value.get('conv_cfg'))
        # dict.pop gives the type as the config has it. If types are imported, ConfigDict's
        # own methods would give the class, which cannot be written as text.
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
    """Remove mmrep's hooks, backends, imports and constructor from a config, in place."""
    registries = (HOOKS, OPTIM_WRAPPER_CONSTRUCTORS, VISBACKENDS)
    names = {name for registry in registries for name in registry.module_dict}

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
        (_dict_in(cfg, 'visualizer'), 'vis_backends'),
    ):
        if name in owner:
            owner[name] = others(owner[name])
    wrapper = _dict_in(cfg, 'optim_wrapper')
    if ours(wrapper.get('constructor')):
        del wrapper['constructor']


def deploy_config(cfg: Config) -> Config:
    """The config of the fused model: ``deploy=True`` for each type that takes it.

    Pretrained initializations, the checkpoint to start from and RepOptimizer are left out,
    since they belong to the train form. For an expanded model, the model is that of the
    plain config. If no type in the model is then mmrep's, mmrep's hooks, visualizer
    backends, imports and optimizer constructor are left out, too. If a class has no
    argument for its deploy form, or nothing in the model is known to have a deploy form,
    ``mmrep.Deployed`` builds it.

    Raises:
        ConfigError: If a type in the config's model is unknown.
    """
    deployed = copy.deepcopy(cfg)
    expanded = is_expanded(cfg)
    deployed.model = without_pretrained(_plain(deployed.model))
    nodes = [node for node in model_nodes(deployed.model) if _switchable_class(node)]
    wrapper = _dict_in(deployed, 'optim_wrapper')
    if _class_name(wrapper.get('constructor')) == 'RepOptimizerConstructor':
        # It imitates scaled branches in training, which a fused model does not have.
        del wrapper['constructor']
        wrapper.pop('scales', None)
    if not any(_is_ours(node) for node in model_nodes(deployed.model)):
        _without_ours(deployed)
    for node in nodes:
        if argument := deploy_argument(node):
            node[argument] = True
    if not (nodes or expanded) or not all(map(deploy_argument, nodes)):
        # What a type builds may contain blocks.
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
    """Channels, height and width of the model's input in testing.

    The size is that of the data preprocessor, else the last one in the test pipeline, else
    224 x 224; the channels are the backbone's ``in_channels``, else 3.
    """
    model = _dict_in(cfg, 'model')
    channels = _dict_in(model, 'backbone').get('in_channels', 3)
    # Data preprocessors give (height, width), mmcv's transforms (width, height).
    size = _pair(_dict_in(model, 'data_preprocessor').get('size'))
    for transform in reversed(_test_pipeline(cfg)):
        for key in _SIZE_KEYS:
            size = size or _pair(transform.get(key), width_first=True)
    return channels, *(size or (224, 224))


def _dict_in(cfg: Config | dict, name: str) -> dict:
    """An entry if it is a dict, else an empty dict."""
    value = cfg.get(name)
    return value if isinstance(value, dict) else {}


def _pair(size: Any, width_first: bool = False) -> tuple[int, int] | None:
    """A size as (height, width); ``None`` if it does not give both."""
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
