"""Fuse the blocks before a test loop."""

import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook, Hook
from mmengine.logging import print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import Runner
from torch import nn

from mmrep.errors import reason
from mmrep.hosts import forward
from mmrep.registry import HOOKS
from mmrep.reparam import (
    Call,
    DeployReport,
    NotFoldableError,
    block_references,
    branch_by_branch,
    compare_blocks,
    reparam_blocks,
    seen_inputs,
    switch_to_deploy,
)

#: The largest relative L2 error of a block; in float64, a tenth of it.
_RTOL = 1e-4


@HOOKS.register_module()
class SwitchToDeployHook(Hook):
    """Turn every block of the runner's model into one conv before it is tested.

    This happens after weights are loaded. The averaged model of an
    :class:`~mmengine.hooks.EMAHook` is fused as well, so that ``EMAHook`` swaps in weights
    in deploy form. Each block is compared with its branches, as by
    :func:`~mmrep.reparam.compare_blocks`. Training is not affected: only a test loop
    triggers the fusion.

    Args:
        shape (tuple[int, int, int], optional): Channels, height and width of the test
            images. A forward pass with this shape finds the input sizes that kernels
            depend on under 'SAME' padding with a stride, and what blocks of other packages
            compute. Default: None, the shape that
            :func:`~mmrep.deployment.input_shape` finds in the config.
    """

    priority = 'LOW'

    def __init__(self, shape: tuple[int, int, int] | None = None) -> None:
        self.shape = shape

    def before_test(self, runner: Runner) -> None:
        """Fuse the model, in place.

        Raises:
            NotFoldableError: If a block cannot be fused, or differs from its branches.
        """
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        averaged = [h.ema_model.module for h in runner.hooks if isinstance(h, EMAHook)]
        report, *_ = [_fuse(each, self.shape, runner.cfg) for each in (model, *averaged)]
        print_log(
            f'Switched {len(report.switched)} blocks to deploy form: '
            f'{report.params_before:,} -> {report.params_after:,} parameters',
            logger='current',
        )


def _fuse(
    model: nn.Module, shape: tuple[int, int, int] | None, cfg: Config
) -> DeployReport:
    """Switch a model to deploy form, and compare its blocks with their branches."""
    model = model.module if isinstance(model, BaseTTAModel) else model
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with branch_by_branch(model):
            seen: dict[str, Call] = {}
            blocks = reparam_blocks(model)
            if any(getattr(block, 'lacks_size', True) for block in blocks.values()):
                with seen_inputs(model) as seen:
                    _show(model, shape, cfg)
            for name, block in blocks.items():
                # A block that knows its input size needs no forward pass.
                known = hasattr(block, 'check_foldable') and block.input_size
                if known and name not in seen:
                    x = torch.zeros(1, block.in_channels, *block.input_size)
                    seen[name] = Call((x.to(next(block.parameters())),), {})
            references = block_references(model, seen)
        dtype = next(model.parameters()).dtype
        report = switch_to_deploy(model)
        for name, difference in compare_blocks(references, model).items():
            if not difference.is_within(_RTOL, dtype):
                raise NotFoldableError(
                    f'{name} is {difference.worst:.3g} (relative L2) from its branches, '
                    'which is more than rounding'
                )
    except NotFoldableError:
        raise
    except ValueError as error:
        raise NotFoldableError(f'the deploy form cannot be verified: {error}') from error
    finally:
        for module, training in modes:
            module.training = training
    return report


@torch.no_grad()
def _show(model: nn.Module, shape: tuple[int, int, int] | None, cfg: Config) -> None:
    """Run a model once, so that its blocks see an input."""
    # Imported here, because training does not need it.
    from mmrep.deployment import input_shape
    from mmrep.deployment.running import seeded_input

    x = seeded_input((1, *(shape or input_shape(cfg))), seed=0)
    try:
        forward(model, x.to(next(model.parameters())))
    except Exception as error:
        # A model may raise anything for an input that it is not made for.
        raise NotFoldableError(
            f'the model cannot process an input of shape {tuple(x.shape)} '
            f'({reason(error)}): give SwitchToDeployHook the shape of the images'
        ) from error
