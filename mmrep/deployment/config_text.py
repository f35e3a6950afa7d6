"""Configs as text that reads back."""

import math
from pathlib import Path
from pprint import pformat
from tempfile import TemporaryDirectory
from typing import Any

from mmengine.config import Config

from mmrep.errors import ConfigError, reason

#: What is longer is not for mmengine to format: yapf takes ten seconds for a dict of this
#: many characters, and four times that for one of twice as many.
_FORMATTED = 32_000


class _NotFinite(float):
    """An infinity or a NaN that is written as Python reads it."""

    def __repr__(self) -> str:
        return f"float('{float.__repr__(self)}')"

    __str__ = __repr__


def written_config(cfg: Config) -> tuple[str, Config]:
    """A config as text, and what is read from this text.

    mmengine's ``pretty_text`` writes ``inf`` and ``nan``, which are no Python; here they
    are calls of ``float``.

    Args:
        cfg: The config.

    Raises:
        ConfigError: If it holds what cannot be written, or not be read again.
    """
    try:
        values = _writable(cfg.to_dict())
        text = Config(values, format_python_code=False).pretty_text
        formatted = (
            Config(values).pretty_text if len(text) <= _FORMATTED else _plain(values)
        )
        return formatted, read_text(formatted)
    except Exception as error:
        # Whatever its values do when they are printed, or their text when it is run.
        raise ConfigError(
            f'this config cannot be written as text ({reason(error)}): give it numbers, '
            'strings, lists and dicts alone, and names of entries that Python takes'
        ) from error


def _writable(value: Any) -> Any:
    """A copy in which numbers that are not finite print as Python reads them."""
    if isinstance(value, dict):
        return {_writable(key): _writable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set):
        return type(value)(map(_writable, value))
    if isinstance(value, float) and not math.isfinite(value):
        return _NotFinite(value)
    return value


def _plain(values: dict) -> str:
    """Entries with literals: Python takes long to compile ``dict`` of many keywords."""
    return ''.join(f'{key} = {pformat(values[key])}\n' for key in sorted(values))


def read_text(text: str) -> Config:
    """The config that a text is."""
    # Config.fromstring leaves its file if the text cannot be read.
    with TemporaryDirectory() as folder:
        path = Path(folder) / 'config.py'
        path.write_text(text, 'utf-8')
        return Config.fromfile(path)
