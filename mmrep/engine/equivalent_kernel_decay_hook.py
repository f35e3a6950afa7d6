"""RepVGG's weight decay on the equivalent kernels."""

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor

from mmrep.errors import ConfigError
from mmrep.models.blocks import RepVGGBlock
from mmrep.registry import HOOKS


def equivalent_kernel_l2(block: RepVGGBlock) -> Tensor:
    """The penalty of a block: how large the 3x3 kernel is that it is fused to.

    With the scales ``t = gamma / sqrt(var + eps)`` of the two conv branches, which count
    as constants, the ring of the 3x3 kernel adds ``sum K3^2``, and the centre
    ``sum (t3 K3 + t1 K1)^2 / (t3^2 + t1^2)``: it is large only where the branches agree.

    Source: the `official code <https://github.com/DingXiaoH/RepVGG>`_, "custom L2".

    Args:
        block (RepVGGBlock): A block in train form.

    Returns:
        Tensor: A scalar, differentiable with respect to the two kernels.
    """
    scales = []
    for branch in (block.branch_3x3, block.branch_1x1):
        norm = branch.norm
        gamma = 1 if norm.weight is None else norm.weight.detach()
        scales.append((gamma * (norm.running_var + norm.eps).rsqrt()).view(-1, 1, 1, 1))
    scale3, scale1 = scales
    kernel3, kernel1 = block.branch_3x3.conv.weight, block.branch_1x1.conv.weight
    centre3 = kernel3[:, :, 1:2, 1:2]
    ring = kernel3.square().sum() - centre3.square().sum()
    centre = (scale3 * centre3 + scale1 * kernel1).square()
    return ring + (centre / (scale3.square() + scale1.square())).sum()


@HOOKS.register_module()
class EquivalentKernelDecayHook(Hook):
    """Decay the equivalent kernels of RepVGG blocks: ``loss += wd / 2 sum L2(block)``.

    The gradient is added directly before every step of the optimizer, so that it is
    decayed once a step and unscaled, whatever the accumulation and the precision of the
    loss. The 3x3 and 1x1 kernels must be left out of the optimizer's own weight decay.

    Source: the `official code <https://github.com/DingXiaoH/RepVGG>`_, ``--custom-l2``.

    Args:
        weight_decay (float): The factor ``wd``.
    """

    def __init__(self, weight_decay: float) -> None:
        self.weight_decay = weight_decay

    def before_train(self, runner: Runner) -> None:
        """Find the blocks and put the penalty before the optimizer's steps."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        blocks = [
            module
            for module in model.modules()
            if isinstance(module, RepVGGBlock) and not module.deploy
        ]
        if not blocks:
            raise ConfigError(
                'EquivalentKernelDecayHook found no RepVGG block in train form: leave it '
                'out of custom_hooks'
            )
        self._handle = runner.optim_wrapper.optimizer.register_step_pre_hook(
            lambda *_: self.add_gradients(blocks)
        )

    def after_train(self, runner: Runner) -> None:
        """Take the penalty away again."""
        self._handle.remove()

    @torch.enable_grad()
    def add_gradients(self, blocks: list[RepVGGBlock]) -> None:
        """Add the penalty's gradients to those of the blocks' kernels."""
        for block in blocks:
            kernels = [block.branch_3x3.conv.weight, block.branch_1x1.conv.weight]
            kernels = [kernel for kernel in kernels if kernel.grad is not None]
            if not kernels:
                continue
            gradients = torch.autograd.grad(equivalent_kernel_l2(block), kernels)
            for kernel, gradient in zip(kernels, gradients, strict=True):
                kernel.grad.add_(gradient, alpha=self.weight_decay / 2)
