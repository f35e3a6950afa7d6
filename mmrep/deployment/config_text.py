"""Write configs as text that can be read back."""

import math
from pathlib import Path
from pprint import pformat
from tempfile import TemporaryDirectory
from typing import Any

from mmengine.config import Config

from mmrep.errors import ConfigError, reason

#: Longer texts, in characters, are not formatted by mmengine: yapf takes ten seconds for a
#: dict of this length, and four times as long for twice the length.
_FORMATTED = 32_000


class _NotFinite(float):
    """An infinity or NaN that prints as valid Python."""

    def __repr__(self) -> str:
        return f"float('{float.__repr__(self)}')"

    __str__ = __repr__


def written_config(cfg: Config) -> tuple[str, Config]:
    """Write a config as text; returns the text and the config that is read back from it.

    mmengine's ``pretty_text`` writes ``inf`` and ``nan``, which are not valid Python; here
    they are written as ``float('inf')`` and ``float('nan')``.

    Args:
        cfg: The config.

    Raises:
        ConfigError: If a value cannot be written, or the text cannot be read back.
    """
    try:
        values = _writable(cfg.to_dict())
        text = Config(values, format_python_code=False).pretty_text
        formatted = (
            Config(values).pretty_text if len(text) <= _FORMATTED else _plain(values)
        )
        return formatted, read_text(formatted)
    except Exception as error:
        # Printing a value, or running the text, may raise anything.
        raise ConfigError(
            f'this config cannot be written as text ({reason(error)}): use only numbers, '
            'strings, lists and dicts as values, and valid Python names as keys'
        ) from error


def _writable(value: Any) -> Any:
    """A copy in which infinities and NaNs print as valid Python."""
    if isinstance(value, dict):
        return {_writable(key): _writable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set):
        return type(value)(map(_writable, value))
    if isinstance(value, float) and not math.isfinite(value):
        return _NotFinite(value)
    return value


def _plain(values: dict) -> str:
    """Entries as literals: Python compiles ``dict(...)`` of many keywords slowly."""
    return ''.join(f'{key} = {pformat(values[key])}\n' for key in sorted(values))


def read_text(text: str) -> Config:
    """Read a config from text."""
    # Config.fromstring leaves a temporary file behind if the text cannot be read.
    with TemporaryDirectory() as folder:
        path = Path(folder) / 'config.py'
        path.write_text(text, 'utf-8')
        return Config.fromfile(path)
