"""A plain conv and its norm, as one conv where that is less work."""

import torch
from torch import Tensor, nn

from mmrep.reparam import conv_geometry, fuse_bn, is_batch_norm, norm_tensors

#: How many values are scaled by a norm in the time that folding takes before its first
#: weight, and in the time that it takes for one more weight. Measured on two cores.
_BEFORE_FIRST, _PER_WEIGHT = 50_000, 0.4


def conv_norm(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    """``norm(conv(x))``, with the norm folded into the conv where that pays.

    That can be where the norm uses running statistics: in eval mode, with ``norm_eval``
    and in frozen stages. It is computed from the current parameters, with exact gradients
    to them.

    Args:
        conv: The conv; one of another type than ``nn.Conv2d`` is computed as it is.
        norm: The norm after it.
        x: ``(N, in, H, W)``.
    """
    if not (
        type(conv) is nn.Conv2d
        and x.device.type == 'cpu'
        and conv.weight.dtype in (torch.float32, torch.float64)
        and not norm.training
        and is_batch_norm(norm)
        and not _is_watched(conv)
        and not _is_watched(norm)
    ):
        return norm(conv(x))
    frame = conv_geometry(conv)
    pixels = x.size(0) * x.size(2) * x.size(3) // (frame.stride[0] * frame.stride[1])
    if pixels * frame.out_channels < _BEFORE_FIRST + _PER_WEIGHT * conv.weight.numel():
        return norm(conv(x))
    weight, bias = fuse_bn(conv.weight, conv.bias, *norm_tensors(norm))
    return frame.convolve(x, weight, bias)


def _is_watched(module: nn.Module) -> bool:
    """Whether somebody waits for the module itself to compute."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
