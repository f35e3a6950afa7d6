"""RepOptimizer: train plain convs as if they were sums of scaled branches."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from mmrep.errors import ConfigError
from mmrep.registry import OPTIM_WRAPPER_CONSTRUCTORS

from .searched_scales import read_scales, scaled_convs


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class RepOptimizerConstructor(DefaultOptimWrapperConstructor):
    """Build an optimizer that trains plain convs like sums of scaled branches.

    If a block ``W = s_k W_k + s_1 W_1 + s_0 W_0`` with constant scales is trained, ``W``
    changes as if its gradient were multiplied by ``s_k^2`` at every tap, plus ``s_1^2`` at
    the centre tap, plus ``s_0^2`` on the diagonal of the centre tap. For SGD, the gradient
    is multiplied by this factor. AdamW divides gradients by their magnitude, so there the
    step is multiplied, with the absolute values of the scales in place of their squares.

    This is exact for SGD, including momentum and weight decay, and for AdamW up to its
    ``eps``. It is not exact if gradients are clipped, since the gradients of the branches
    would have other norms; a warning says so. The authors' code uses 1 instead of
    ``s_0^2``.

    Source: `Re-parameterizing Your Optimizers rather than Architectures
    <https://arxiv.org/abs/2205.15242>`_, section 3.1 and appendix A.

    Args:
        optim_wrapper_cfg (dict): Config of the wrapper. Its ``scales`` is the path of a
            checkpoint of the search, a network of ``ScaleSumBlock``; its optimizer is SGD
            or AdamW.
        paramwise_cfg (dict, optional): See mmengine's ``DefaultOptimWrapperConstructor``.

    Raises:
        ConfigError: If there are no scales, if they belong to another network, or if the
            optimizer is neither SGD nor AdamW, or is a fused AdamW.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        cfg = dict(optim_wrapper_cfg)
        self.scales = cfg.pop('scales', None)
        if self.scales is None:
            raise ConfigError(
                'RepOptimizerConstructor needs scales: give optim_wrapper '
                "scales='CKPT', a checkpoint of a network of ScaleSumBlock"
            )
        super().__init__(cfg, paramwise_cfg)

    def __call__(self, model: nn.Module) -> OptimWrapper:
        wrapper = super().__call__(model)
        optimizer = wrapper.optimizer
        powers = {SGD: 2, AdamW: 1}
        if type(optimizer) not in powers:
            raise ConfigError(
                f'RepOptimizer works with SGD and AdamW, not {type(optimizer).__name__}: '
                'give another type to optim_wrapper.optimizer'
            )
        if optimizer.defaults.get('fused') and isinstance(optimizer, AdamW):
            # It skips a step silently if a GradScaler has found inf.
            raise ConfigError('RepOptimizer cannot use a fused AdamW: leave fused=True out')
        multipliers = self._multipliers(model, powers[type(optimizer)])
        if isinstance(optimizer, SGD):
            optimizer.register_step_pre_hook(_MultiplyGradients(multipliers))
        else:
            steps = _MultiplySteps(multipliers)
            optimizer.register_step_pre_hook(steps.before)
            optimizer.register_step_post_hook(steps.after)
        if wrapper.clip_grad_kwargs:
            print_log(
                'RepOptimizer with clip_grad is not equivalent to training the branches: '
                'their gradients have other norms',
                logger='current',
                level=logging.WARNING,
            )
        return wrapper

    def _multipliers(self, model: nn.Module, power: int) -> dict[nn.Parameter, Tensor]:
        """The factors for the gradient or the step of every kernel that has scales."""
        model = model.module if is_model_wrapper(model) else model
        scales = {
            name: {branch: value.double().abs() ** power for branch, value in own.items()}
            for name, own in read_scales(self.scales).items()
        }
        return {
            block.weight: branches.sum_kernel().detach().to(block.weight.dtype)
            for block, branches in scaled_convs(model, scales, self.scales).values()
        }


class _MultiplyGradients:
    """Step pre-hook of SGD, called after gradients are reduced over ranks and unscaled."""

    def __init__(self, multipliers: Mapping[nn.Parameter, Tensor]) -> None:
        self.multipliers = multipliers

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if args[1:] or kwargs.get('closure'):
            raise RuntimeError(
                'RepOptimizer needs the gradients before its step: call step() '
                'without a closure'
            )
        for parameter, multiplier in self.multipliers.items():
            if parameter.grad is not None:
                parameter.grad.mul_(multiplier.to(parameter.grad.device))


class _MultiplySteps:
    """Step hooks of AdamW, which multiply its step but not its weight decay."""

    def __init__(self, multipliers: Mapping[nn.Parameter, Tensor]) -> None:
        self.multipliers = multipliers
        self.decayed: dict[nn.Parameter, Tensor] = {}

    @torch.no_grad()
    def before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.decayed = {
            parameter: parameter * (1 - group['lr'] * group['weight_decay'])
            for group in optimizer.param_groups
            for parameter in group['params']
            if parameter in self.multipliers and parameter.grad is not None
        }

    @torch.no_grad()
    def after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for parameter, decayed in self.decayed.items():
            multiplier = self.multipliers[parameter].to(parameter.device)
            parameter.copy_(decayed + multiplier * (parameter - decayed))
        self.decayed = {}
