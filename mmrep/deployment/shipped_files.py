"""Find the configs and tools that come with the package."""

import re
from fnmatch import fnmatchcase
from pathlib import Path

from mmrep.errors import UserError

_PACKAGE = Path(__file__).parents[1]

#: How the name of an ImageNet-1k classifier ends: GPUs, batch size and data set.
_USUAL = r'_\d+xb\d+_in1k'


def shipped(name: str) -> Path:
    """The path of what comes with the package: ``'configs'``, ``'tools'``.

    An installed package has it inside, a clone beside the package.

    Raises:
        UserError: If it is in neither place.
    """
    for folder in (_PACKAGE / '.mim', _PACKAGE.parent):
        if (folder / name).exists():
            return folder / name
    raise UserError(
        f'this mmrep came without its {name}: install it from a wheel or a clone'
    )


def list_models(pattern: str = '*') -> list[str]:
    """The names of the shipped configs that match a pattern, as ``'*dbb*'``.

    :func:`mmrep.get_model` and the tools accept each of them.
    """
    return sorted(name for name in _configs() if fnmatchcase(name, pattern))


def config_of(name: str) -> Path:
    """The path of a shipped config, by its name.

    Args:
        name: One of :func:`list_models`. For an ImageNet-1k classifier the beginning is
            enough: ``'repvgg-a0'`` for ``'repvgg-a0_8xb32_in1k'``.

    Raises:
        UserError: If there is no such config.
    """
    configs = _configs()
    if name not in configs:
        usual = [
            other for other in configs if re.fullmatch(re.escape(name) + _USUAL, other)
        ]
        if len(usual) != 1:
            near = ', '.join(list_models(f'*{name}*')[:8]) or 'those of mmrep.list_models()'
            raise UserError(f'there is no network {name!r}: choose from {near}')
        (name,) = usual
    return configs[name]


def _configs() -> dict[str, Path]:
    """The paths of the configs whose network can be built, by their names."""
    return {path.stem: path for path in shipped('configs').glob('[!_]*/*.py')}
