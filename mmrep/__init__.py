"""Structural re-parameterization for OpenMMLab.

Train a multi-branch network, deploy a plain one, and prove that they are the same
function.
"""

try:
    import mmcv  # noqa: F401
except ImportError as error:
    raise ImportError(
        'mmrep needs mmcv or mmcv-lite: install the one that your other OpenMMLab '
        "packages use (mim install 'mmcv>=2.0.0rc4,<2.2.0'), or, with none of them, "
        "pip install 'mmrep[lite]'"
    ) from error

from . import engine, expansion, models
from .registry import share_names
from .version import __version__

share_names()

__all__ = ['__version__', 'engine', 'expansion', 'models']
