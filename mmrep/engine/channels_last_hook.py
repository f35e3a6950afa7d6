"""Compute with channels last in memory."""

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor, nn

from mmrep.registry import HOOKS


@HOOKS.register_module()
class ChannelsLastHook(Hook):
    """Lay a model out for ``torch.channels_last`` before it is trained or tested.

    A conv whose weight is laid out so computes so, and the layers after it follow: the
    data need no change, and neither do checkpoints, which load into every layout. It pays
    on CPUs, and on GPUs with mixed precision. See :func:`to_channels_last`.
    """

    def before_run(self, runner: Runner) -> None:
        """Change the layout of the runner's model, in place."""
        to_channels_last(runner.model)


def to_channels_last(model: nn.Module) -> nn.Module:
    """Lay out the weights of a model for ``torch.channels_last``, in place.

    Strided 1x1 convs of fewer than 16 channels stay as they are and compute with channels
    first: on a CPU, torch 2.12's gradient of their weight with channels last writes
    beyond its memory.

    Returns:
        The model.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and _is_unsafe(module):
            module.register_forward_pre_hook(_with_channels_first)
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(
                    memory_format=torch.channels_last
                )
    return model


def _is_unsafe(conv: nn.Conv2d) -> bool:
    return conv.kernel_size == (1, 1) and max(conv.stride) > 1 and conv.in_channels < 16


def _with_channels_first(conv: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0].contiguous(),)
