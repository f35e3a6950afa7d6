"""RepVGG's weight decay on the equivalent kernels."""

from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor, nn

from mmrep.errors import ConfigError
from mmrep.models.blocks import RepVGGBlock
from mmrep.registry import HOOKS
from mmrep.reparam import bn_affine, has_running_statistics, norm_tensors


def equivalent_kernel_l2(block: RepVGGBlock) -> Tensor:
    """The L2 penalty of a block, which measures the 3x3 kernel that it is fused to.

    ``t = gamma / sqrt(var + eps)`` are the scales of the two conv branches, used as
    constants. The outer taps of the 3x3 kernel add ``sum K3^2``, and the centre tap adds
    ``sum (t3 K3 + t1 K1)^2 / (t3^2 + t1^2)``, which is large only where the branches agree.

    Source: the `official code <https://github.com/DingXiaoH/RepVGG>`_, "custom L2".

    Args:
        block (RepVGGBlock): A block in train form.

    Returns:
        Tensor: A scalar, at least float32, differentiable with respect to the two kernels.

    Raises:
        ConfigError: If a norm has no running statistics.
    """
    scales, kernels = [], []
    for branch in (block.branch_3x3, block.branch_1x1):
        if not has_running_statistics(branch.norm):
            raise ConfigError(
                'the L2 norm of an equivalent kernel needs norms with running statistics, '
                f'not {type(branch.norm).__name__}: leave EquivalentKernelDecayHook out'
            )
        kernel = branch.conv.weight
        dtype = torch.promote_types(kernel.dtype, torch.float32)
        with torch.no_grad():
            scale, _ = bn_affine(*norm_tensors(branch.norm))
        scales.append(scale.to(dtype).view(-1, 1, 1, 1))
        kernels.append(kernel.to(dtype))
    (scale3, scale1), (kernel3, kernel1) = scales, kernels
    centre3 = kernel3[:, :, 1:2, 1:2]
    ring = kernel3.square().sum() - centre3.square().sum()
    centre = (scale3 * centre3 + scale1 * kernel1).square()
    return ring + (centre / (scale3.square() + scale1.square())).sum()


def train_form_blocks(model: nn.Module) -> list[RepVGGBlock]:
    """The RepVGG blocks of a model that are not switched to deploy form."""
    blocks = (module for module in model.modules() if isinstance(module, RepVGGBlock))
    return [block for block in blocks if not block.deploy]


@HOOKS.register_module()
class EquivalentKernelDecayHook(Hook):
    """Decay the equivalent kernels of RepVGG blocks: ``loss += wd / 2 sum L2(block)``.

    During training, the model's forward pass with ``mode='loss'`` returns an additional
    loss, ``loss_equivalent_kernels``. It is logged, scaled, accumulated and reduced over
    processes like every loss. ``L2`` is :func:`equivalent_kernel_l2`, with the running
    statistics after this forward pass. The optimizer's own weight decay must exclude the
    3x3 and 1x1 kernels.

    Source: the `official code <https://github.com/DingXiaoH/RepVGG>`_, ``--custwd``.

    Args:
        weight_decay (float): The factor ``wd``.
    """

    loss_name = 'loss_equivalent_kernels'

    def __init__(self, weight_decay: float) -> None:
        self.weight_decay = weight_decay

    def before_train(self, runner: Runner) -> None:
        """Register the forward hook that adds the loss to the model's own."""
        # Not on the wrapper: DDP finds the parameters in use from what the model returns.
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        if not train_form_blocks(model):
            raise ConfigError(
                'EquivalentKernelDecayHook found no RepVGG block in train form: leave it '
                'out of custom_hooks'
            )
        self._handle = model.register_forward_hook(self.add_loss, with_kwargs=True)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Refuse to train without the loss.

        Raises:
            ConfigError: If the model's training step did not log the loss.
        """
        if self.loss_name not in (outputs or {}):
            raise ConfigError(
                f'the train_step of {type(runner.model).__name__} does not log '
                f'{self.loss_name}: EquivalentKernelDecayHook needs a model that calls its '
                "forward with mode='loss'"
            )

    def after_train(self, runner: Runner) -> None:
        """Remove the forward hook."""
        self._handle.remove()

    def add_loss(
        self, model: nn.Module, args: tuple, kwargs: dict, losses: Any
    ) -> dict | None:
        """Forward hook that adds the loss, if ``mode='loss'``.

        Raises:
            ConfigError: If the model's losses are not a dict.
        """
        if kwargs.get('mode') != 'loss':
            return None
        if not isinstance(losses, dict):
            raise ConfigError(
                f'{type(model).__name__} returns {type(losses).__name__} instead of a dict '
                'of losses: leave EquivalentKernelDecayHook out of custom_hooks'
            )
        penalty = sum(map(equivalent_kernel_l2, train_form_blocks(model)))
        return {**losses, self.loss_name: self.weight_decay / 2 * penalty}
