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
        f'mmrep needs mmcv and mmengine ({error}), from the project of your other '
        "packages: for OpenMMLab, mim install 'mmcv>=2.0.0rc4,<2.2.0'; for OneDL, pip "
        "install onedl-mmcv; without other packages, pip install 'mmrep[lite]'"
    ) from error

from . import engine, expansion, models
from .registry import share_names
from .version import __version__

if TYPE_CHECKING:
    # Imported on first use: they import the code that reads files.
    from .deployment import list_models
    from .zoo import get_model

share_names()

_LAZY = {'get_model': '.zoo', 'list_models': '.deployment'}

__all__ = ['__version__', 'engine', 'expansion', 'get_model', 'list_models', 'models']


def __getattr__(name: str) -> object:
    """Import a name of ``_LAZY`` on its first use."""
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
