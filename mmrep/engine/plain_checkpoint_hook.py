"""Checkpoints that open anywhere."""

from collections.abc import Mapping
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.runner import Runner
from torch import Tensor

from mmrep.registry import HOOKS

#: Weights are tensors, in a dict that knows the versions of its modules.
_WEIGHTS = ('state_dict', 'ema_state_dict')


@HOOKS.register_module()
class PlainCheckpointHook(Hook):
    """Write checkpoints that ``torch.load(weights_only=True)`` reads.

    It is the default since torch 2.6, and refuses the history of the logged values and the
    numpy numbers in mmengine's own checkpoints; the inference APIs of mmpretrain and mmseg
    then cannot open them. mmengine resumes plain ones without this hook, too, but for that
    history, which the logged means are taken from.
    """

    # What other hooks add must be plain, too.
    priority = 'LOWEST'

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Turn everything but the weights into plain types."""
        # Here, because only what reads and writes checkpoints needs it.
        from mmrep.checkpoints import plain

        hub = checkpoint['message_hub']
        logged = {name: _history(buffer) for name, buffer in hub['log_scalars'].items()}
        checkpoint['message_hub'] = {**hub, 'log_scalars': logged}
        if 'param_schedulers' in checkpoint:
            checkpoint['param_schedulers'] = _without_functions(
                checkpoint['param_schedulers']
            )
        for key in checkpoint.keys() - {*_WEIGHTS}:
            checkpoint[key] = plain(checkpoint[key])
        for weights in (checkpoint[key] for key in _WEIGHTS if key in checkpoint):
            for key, value in weights.items():
                # FSDP's have attributes, which their pickles would keep.
                weights[key] = value.detach() if isinstance(value, Tensor) else value

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Turn the history of logged values back."""
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
    """The arguments that make a buffer again."""
    values, counts = map(torch.from_numpy, buffer.data)
    return dict(log_history=values, count_history=counts, max_length=buffer.max_length)


def _without_functions(states: Any) -> Any:
    """States of schedulers without their functions, which every scheduler has itself."""
    if isinstance(states, Mapping):
        return {k: _without_functions(v) for k, v in states.items() if not callable(v)}
    if isinstance(states, list):
        return [_without_functions(state) for state in states]
    return states
