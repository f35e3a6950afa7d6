"""Structural re-parameterization for OpenMMLab.

Train a multi-branch network, deploy a plain one, and prove that they are the same
function.
"""

import importlib
from typing import TYPE_CHECKING

try:
    import mmcv  # noqa: F401
    import mmengine  # noqa: F401
except ImportError as error:
    raise ImportError(
        f'mmrep needs mmcv and mmengine ({error}), of the line that your other packages '
        "are of: OpenMMLab's by mim install 'mmcv>=2.0.0rc4,<2.2.0', OneDL's by pip "
        "install onedl-mmcv; with no other package, pip install 'mmrep[lite]'"
    ) from error

from . import engine, expansion, models
from .registry import share_names
from .version import __version__

if TYPE_CHECKING:
    # Imported when they are asked for: they bring what reads files.
    from .deployment import list_models
    from .zoo import get_model

share_names()

_LAZY = {'get_model': '.zoo', 'list_models': '.deployment'}

__all__ = ['__version__', 'engine', 'expansion', 'get_model', 'list_models', 'models']


def __getattr__(name: str) -> object:
    """One of ``_LAZY``."""
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
