"""Build the model of a config."""

from contextlib import nullcontext
from typing import Any

from mmengine.config import Config
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn import init
from torch.overrides import TorchFunctionMode

from mmrep.errors import ConfigError, reason

from .config import for_one_process, without_pretrained


def build_model(cfg: Config, unset: bool = False) -> nn.Module:
    """The model of a config, with no weights loaded or downloaded, in eval mode.

    Args:
        cfg: The config.
        unset: Whether to leave out the random numbers that parameters start with, for a
            model whose every parameter is loaded next. Default: False.

    Raises:
        ConfigError: If it cannot be built.
    """
    try:
        model_cfg = for_one_process(without_pretrained(cfg.model))
        with _NoRandomStart() if unset else nullcontext():
            return MODELS.build(model_cfg).eval()
    except Exception as error:
        # A constructor may raise anything.
        raise ConfigError(
            f'the model of this config cannot be built ({reason(error)}): correct it'
        ) from error


class _NoRandomStart(TorchFunctionMode):
    """Gives parameters no values, so that their memory is not touched."""

    def __torch_function__(self, func, types, args=(), kwargs=None) -> Any:
        target = args[0] if args else (kwargs or {}).get('tensor')
        if isinstance(target, nn.Parameter) and (
            func in (Tensor.uniform_, Tensor.normal_)
            or getattr(func, '__module__', None) == init.__name__
        ):
            return target
        return func(*args, **(kwargs or {}))
