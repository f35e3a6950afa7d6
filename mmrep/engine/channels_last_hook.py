"""Compute with channels last in memory."""

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmrep.registry import HOOKS


@HOOKS.register_module()
class ChannelsLastHook(Hook):
    """Lay a model out for ``torch.channels_last`` before it is trained or tested.

    A conv whose weight is laid out so computes so, and the layers after it follow: the
    data need no change, and neither do checkpoints, which load into every layout. It pays
    on CPUs, and on GPUs with mixed precision.
    """

    def before_run(self, runner: Runner) -> None:
        """Change the layout of the runner's model, in place."""
        runner.model.to(memory_format=torch.channels_last)
