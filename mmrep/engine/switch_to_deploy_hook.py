"""Fuse the blocks before a test loop."""

import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook, Hook
from mmengine.logging import print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import Runner
from torch import nn

from mmrep.deployment import forward, input_shape
from mmrep.registry import HOOKS
from mmrep.reparam import DeployReport, reparam_blocks, switch_to_deploy


@HOOKS.register_module()
class SwitchToDeployHook(Hook):
    """Turn every block of the runner's model into one conv before it is tested.

    Where 'SAME' padding makes the kernels depend on the size of the input, it is the
    size that :func:`~mmrep.deployment.input_shape` finds in the config.

    Weights are loaded by then, and an :class:`~mmengine.hooks.EMAHook`'s averaged model
    is fused as well, so that what the hook swaps in is the deploy form, too. Training is
    not affected: a test loop alone triggers it.
    """

    priority = 'LOW'

    def before_test(self, runner: Runner) -> None:
        """Fuse the model, in place."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        report = self._fuse(model, runner.cfg)
        for hook in runner.hooks:
            if isinstance(hook, EMAHook):
                self._fuse(hook.ema_model.module, runner.cfg)
        print_log(
            f'Switched {len(report.switched)} blocks to deploy form: '
            f'{report.params_before:,} -> {report.params_after:,} parameters',
            logger='current',
        )

    @staticmethod
    @torch.no_grad()
    def _fuse(model: nn.Module, cfg: Config) -> DeployReport:
        frames = (getattr(b, 'frame', None) for b in reparam_blocks(model).values())
        if any(frame is not None and frame.moves_with_size for frame in frames):
            sees = model.module if isinstance(model, BaseTTAModel) else model
            x = torch.zeros(1, *input_shape(cfg), device=next(sees.parameters()).device)
            training = sees.training
            forward(sees.eval(), x)
            sees.train(training)
        return switch_to_deploy(model)
