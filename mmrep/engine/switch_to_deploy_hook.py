"""Fuse the blocks before a test loop."""

from mmengine.hooks import EMAHook, Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from mmrep.registry import HOOKS
from mmrep.reparam import switch_to_deploy


@HOOKS.register_module()
class SwitchToDeployHook(Hook):
    """Turn every block of the runner's model into one conv before it is tested.

    Weights are loaded by then, and an :class:`~mmengine.hooks.EMAHook`'s averaged model
    is fused as well, so that what the hook swaps in is the deploy form, too. Training is
    not affected: a test loop alone triggers it.
    """

    priority = 'LOW'

    def before_test(self, runner: Runner) -> None:
        """Fuse the model, in place."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        report = switch_to_deploy(model)
        for hook in runner.hooks:
            if isinstance(hook, EMAHook):
                switch_to_deploy(hook.ema_model.module)
        print_log(
            f'Switched {len(report.switched)} blocks to deploy form: '
            f'{report.params_before:,} -> {report.params_after:,} parameters',
            logger='current',
        )
