"""Fuse the blocks before a test loop."""

import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook, Hook
from mmengine.logging import print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import Runner
from torch import nn

from mmrep.errors import reason
from mmrep.registry import HOOKS
from mmrep.reparam import NotFoldableError, reparam_blocks, switch_to_deploy


@HOOKS.register_module()
class SwitchToDeployHook(Hook):
    """Turn every block of the runner's model into one conv before it is tested.

    Weights are loaded by then, and an :class:`~mmengine.hooks.EMAHook`'s averaged model
    is fused as well, so that what the hook swaps in is the deploy form, too. Training is
    not affected: a test loop alone triggers it.

    Args:
        shape (tuple[int, int, int], optional): Channels, height and width of the images
            that are tested, which kernels depend on under 'SAME' padding with a stride.
            Default: None, what :func:`~mmrep.deployment.input_shape` finds in the
            config.
    """

    priority = 'LOW'

    def __init__(self, shape: tuple[int, int, int] | None = None) -> None:
        self.shape = shape

    def before_test(self, runner: Runner) -> None:
        """Fuse the model, in place."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        averaged = [h.ema_model.module for h in runner.hooks if isinstance(h, EMAHook)]
        models = [model, *averaged]
        for each in models:
            if any(getattr(b, 'lacks_size', False) for b in reparam_blocks(each).values()):
                _show(each, self.shape, runner.cfg)
        report, *_ = [switch_to_deploy(each) for each in models]
        print_log(
            f'Switched {len(report.switched)} blocks to deploy form: '
            f'{report.params_before:,} -> {report.params_after:,} parameters',
            logger='current',
        )


@torch.no_grad()
def _show(model: nn.Module, shape: tuple[int, int, int] | None, cfg: Config) -> None:
    """Send an input through a model, in eval mode."""
    # Here, because training needs none of it.
    from mmrep.deployment import forward, input_shape

    model = model.module if isinstance(model, BaseTTAModel) else model
    training = model.training
    x = torch.zeros(1, *(shape or input_shape(cfg)), device=next(model.parameters()).device)
    try:
        forward(model.eval(), x)
    except Exception as error:
        # A model may raise anything for an input that it is not made for.
        raise NotFoldableError(
            f'the model cannot process an input of shape {tuple(x.shape)} '
            f'({reason(error)}): give SwitchToDeployHook the shape of the images'
        ) from error
    finally:
        model.train(training)
