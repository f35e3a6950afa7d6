"""Build the model of a config, and recognize errors of building its parts."""

import traceback
from contextlib import nullcontext
from typing import Any

from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.registry.build_functions import build_from_cfg
from mmengine.runner import BaseLoop
from torch import Tensor, nn
from torch.nn import init
from torch.overrides import TorchFunctionMode

from mmrep.errors import ConfigError, printable, reason

from .config import for_one_process, is_expanded, unknown_type, without_pretrained


def build_model(cfg: Config, unset: bool = False, how: str = '') -> nn.Module:
    """Build the model of a config in eval mode; no weights are loaded or downloaded.

    Args:
        cfg: The config.
        unset: Whether to skip the random initialization of parameters, for a model whose
            parameters are all loaded before it computes anything. An expanded model is
            initialized all the same. Default: False.
        how: What the error says after "cannot be built", as ``' in deploy form'``.
            Default: ''.

    Raises:
        ConfigError: If it cannot be built.
    """
    try:
        model_cfg = for_one_process(without_pretrained(cfg.model))
        # Expanding runs a forward pass, which needs initialized parameters.
        with _NoRandomStart() if unset and not is_expanded(cfg) else nullcontext():
            model = MODELS.build(model_cfg)
            # Not chained: eval() of mmpretrain's backbones returns None.
            model.eval()
            return model
    except Exception as error:
        # A constructor may raise anything.
        unknown = unknown_type(cfg.model, 'model')
        raise ConfigError(
            f'the model of this config cannot be built{how} '
            f'({unknown or reason(error)}): correct it'
        ) from error


def building_fault(error: BaseException) -> str | None:
    """Describe an error that mmengine raised while it built a part of a config.

    A Runner builds some parts when it is made, and others (loops, data sets, optimizers)
    just before it trains or tests, so a tool cannot catch errors of building at one place.
    The traceback tells them: an error that passed through mmengine's registries, or through
    a Runner's ``from_cfg`` or ``build_...``, is one of the config. An error from inside the
    ``run`` of a loop, or from anywhere else, is one of the code.

    Args:
        error: The error, with its traceback.

    Returns:
        A sentence that names the parts from the outermost to the one that failed, as
        ``train_loop > dataloader > CustomDataset``; None for any other error.
    """
    parts, config = [], None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module, function = frame.f_globals.get('__name__', ''), frame.f_code.co_name
        local = frame.f_locals
        if function == 'init_dist' or (
            function == 'run' and isinstance(local.get('self'), BaseLoop)
        ):
            # A loop is running, or the processes of a job are connecting.
            return None
        if frame.f_code is build_from_cfg.__code__:
            config = local['cfg']
            kind = config.get('type') if isinstance(config, dict) else config
            parts.append(getattr(kind, '__name__', str(kind)))
        elif module.startswith('mmengine.runner.'):
            if function in ('from_cfg', '_maybe_compile'):
                config = local['cfg'] if 'cfg' in local else local['self'].cfg
            elif function.startswith('build_'):
                # The first argument is the config of the part.
                code = frame.f_code
                config = local[code.co_varnames['self' in local]]
                parts.append(function.removeprefix('build_'))
    if config is None:
        return None
    why = unknown_type(config) or reason(error)
    what = printable(' > '.join(parts), 200) or 'a run'
    return f'{what} of this config cannot be built ({why}): correct it'


class _NoRandomStart(TorchFunctionMode):
    """Skips the initialization of parameters, so that their memory is not touched."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        target = args[0] if args else (kwargs or {}).get('tensor')
        if isinstance(target, nn.Parameter) and (
            func in (Tensor.uniform_, Tensor.normal_)
            or getattr(func, '__module__', None) == init.__name__
        ):
            return target
        return func(*args, **(kwargs or {}))
