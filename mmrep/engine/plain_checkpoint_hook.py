"""A hook that writes checkpoints in plain types, which ``weights_only=True`` reads."""

import io
import logging
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer, print_log
from mmengine.runner import Runner
from torch import Tensor, nn

from mmrep.registry import HOOKS

#: Entries with weights: tensors, in a dict with the versions of its modules.
_WEIGHTS = ('state_dict', 'ema_state_dict')

#: What mmengine writes, besides its message hub.
_OWN = {'meta', 'optimizer', 'param_schedulers'}


@HOOKS.register_module()
class PlainCheckpointHook(Hook):
    """Write checkpoints that ``torch.load(weights_only=True)`` reads.

    ``weights_only=True`` is the default since torch 2.6. It refuses the history of logged
    values and the numpy numbers in mmengine's own checkpoints, so the inference APIs of
    mmpretrain and mmseg cannot open these. Without this hook, mmengine can resume plain
    checkpoints, except for that history, from which the logged means are computed.

    Entries of custom hooks are not changed, so that the hooks can read them back; if one is
    not plain, a warning says so.
    """

    # Runs last, to check what other hooks add as well.
    priority = 'LOWEST'

    def __init__(self) -> None:
        self._told: set[str] = set()

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Turn what mmengine writes into plain types, and name what else is not plain."""
        hub = checkpoint['message_hub']
        logged = {name: _history(buffer) for name, buffer in hub['log_scalars'].items()}
        # Arrays stay arrays, as the hooks that store them expect.
        infos = {
            key: value.item() if isinstance(value, np.generic) else value
            for key, value in hub['runtime_info'].items()
        }
        checkpoint['message_hub'] = {**hub, 'log_scalars': logged, 'runtime_info': infos}
        if 'param_schedulers' in checkpoint:
            checkpoint['param_schedulers'] = _without_functions(
                checkpoint['param_schedulers']
            )
        for key in checkpoint.keys() & _OWN:
            checkpoint[key] = _plain(checkpoint[key])
        hub_entries = {f'message_hub.runtime_info.{k}': v for k, v in infos.items()}
        others = {
            k: v for k, v in checkpoint.items() if k not in ('message_hub', *_WEIGHTS)
        }
        for name, value in (others | hub_entries).items():
            if name not in self._told and not _opens(value):
                self._told.add(name)
                print_log(
                    f'{name} of the checkpoints has types that torch.load refuses with '
                    "weights_only=True: only mmrep's reader opens the checkpoints, and "
                    'only if these types are of numpy or collections',
                    logger='current',
                    level=logging.WARNING,
                )
        for weights in (checkpoint[key] for key in _WEIGHTS if key in checkpoint):
            for key, value in weights.items():
                # Tensors of FSDP have attributes, which would be pickled, and those of
                # EMAHook are on the GPU.
                weights[key] = value.detach().cpu() if isinstance(value, Tensor) else value

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Turn the history of logged values back into ``HistoryBuffer`` objects."""
        logged = checkpoint.get('message_hub', {}).get('log_scalars', {})
        for name, value in logged.items():
            if isinstance(value, Mapping):
                logged[name] = HistoryBuffer(
                    **{
                        key: item.cpu().numpy() if isinstance(item, Tensor) else item
                        for key, item in value.items()
                    }
                )


def _history(buffer: HistoryBuffer) -> dict[str, Tensor | int]:
    """The arguments that rebuild a buffer."""
    values, counts = map(torch.from_numpy, buffer.data)
    return dict(log_history=values, count_history=counts, max_length=buffer.max_length)


def _plain(value: Any) -> Any:
    """A value without numpy and configs; objects stay as they are."""
    # Imported here, because only reading and writing checkpoints needs it.
    from mmrep.checkpoints import plain

    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_plain, value))
    return plain(value) if isinstance(value, np.ndarray | np.generic | str) else value


def _without_functions(states: Any) -> Any:
    """States of schedulers without functions, which a new scheduler has anyway."""
    if isinstance(states, Mapping):
        return {k: _without_functions(v) for k, v in states.items() if not callable(v)}
    if isinstance(states, list):
        return [_without_functions(state) for state in states]
    return states


def _opens(value: Any) -> bool:
    """Whether ``torch.load(weights_only=True)`` reads a value."""
    file = io.BytesIO()
    try:
        torch.save(_outline(value), file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception:
        # The type of the error depends on the object.
        return False
    return True


def _outline(value: Any) -> Any:
    """A value without its tensors, which may be large."""
    if type(value) in (Tensor, nn.Parameter):
        return None
    if type(value) in (dict, OrderedDict):
        return {key: _outline(item) for key, item in value.items()}
    return type(value)(map(_outline, value)) if type(value) in (list, tuple) else value
