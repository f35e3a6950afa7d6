"""The six transforms of Diverse Branch Block, as functions of tensors.

Every function takes and returns the ``weight`` ``(out, in / groups, kh, kw)`` and the
``bias`` ``(out,)`` of a convolution, allocates in its input's dtype and on its device,
changes none of its arguments and is differentiable.

Numerals refer to section 3.2 of `Diverse Branch Block: Building a Convolution as an
Inception-like Unit <https://arxiv.org/abs/2103.13425>`_.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

KernelBias = tuple[Tensor, Tensor]


def bn_affine(
    mean: Tensor,
    var: Tensor,
    eps: float,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What a batch norm with running statistics is: ``bn(x) == scale x + shift``.

    ``scale = gamma / sqrt(var + eps)`` and ``shift = beta - scale mean``.

    Args:
        mean: Running mean ``(channels,)``.
        var: Running variance ``(channels,)``.
        eps: The constant that the norm adds to the variance.
        gamma: Scale ``(channels,)``; ``None`` stands for ones.
        beta: Shift ``(channels,)``; ``None`` stands for zeros.

    Returns:
        ``scale`` and ``shift``, ``(channels,)``.
    """
    scale = (var + eps).rsqrt()
    if gamma is not None:
        scale = scale * gamma
    if beta is None:
        return scale, -mean * scale
    return scale, torch.addcmul(beta, mean, scale, value=-1)


def fuse_bn(
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
) -> KernelBias:
    """Fold a batch norm with running statistics into the conv before it (I).

    ``conv(x, W', b') == bn(conv(x, W, b))`` with ``s = gamma / sqrt(var + eps)``,
    ``W' = s W`` and ``b' = s (b - mean) + beta``.

    Args:
        weight: Kernel ``(out, in / groups, kh, kw)``.
        bias: Bias ``(out,)``; ``None`` stands for zeros.
        mean: Running mean ``(out,)``.
        var: Running variance ``(out,)``.
        eps: The constant that the norm adds to the variance.
        gamma: Scale ``(out,)``; ``None`` stands for ones.
        beta: Shift ``(out,)``; ``None`` stands for zeros.
    """
    mean = mean if bias is None else mean - bias
    scale, shift = bn_affine(mean, var, eps, gamma, beta)
    return weight * scale.reshape(-1, 1, 1, 1), shift


def add_branches(branches: Sequence[KernelBias]) -> KernelBias:
    """Merge parallel convs of one geometry into one (II).

    ``conv(x, sum W_i, sum b_i) == sum conv(x, W_i, b_i)``.
    """
    weights, biases = zip(*branches, strict=True)
    return sum(weights[1:], weights[0]), sum(biases[1:], biases[0])


def merge_1x1_kxk(
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    groups: int = 1,
) -> KernelBias:
    """Merge a 1x1 conv and the kxk conv after it into one kxk conv (III).

    ``conv(x, W', b') == conv(conv(x, W1, b1), W2, b2)`` with
    ``W'[o, c] = sum_i W2[o, i] W1[i, c]`` and ``b'[o] = b2[o] + sum W2[o, i] b1[i]``,
    exact where the kxk conv does not pad, or pads with ``b1``: what the 1x1 conv makes
    of a zero.

    Args:
        weight1: Kernel ``(mid, in / groups, 1, 1)``.
        bias1: Bias ``(mid,)``; ``None`` stands for zeros.
        weight2: Kernel ``(out, mid / groups, kh, kw)``.
        bias2: Bias ``(out,)``; ``None`` stands for zeros.
        groups: The number of groups of both convs.

    Raises:
        ValueError: If ``weight1`` is not 1x1, or the channels do not chain.
    """
    mid, out = weight1.size(0), weight2.size(0)
    if weight1.shape[2:] != (1, 1) or mid != weight2.size(1) * groups or out % groups:
        raise ValueError(
            f'cannot merge a kernel {tuple(weight1.shape)} with {tuple(weight2.shape)} '
            f'in {groups} groups: the first must be 1x1 and have as many outputs as the '
            'second has inputs'
        )
    first = weight1.reshape(groups, mid // groups, -1)
    second = weight2.reshape(groups, out // groups, mid // groups, -1)
    # (g, o, k, i) @ (g, 1, i, c): one batched matrix product, no loop over groups.
    merged = second.transpose(2, 3).flatten(1, 2) @ first
    weight = merged.unflatten(1, (out // groups, -1)).transpose(2, 3)
    weight = weight.reshape(out, -1, *weight2.shape[2:])
    bias = weight2.new_zeros(out) if bias2 is None else bias2
    if bias1 is not None:
        bias = bias + constant_response(weight2, bias1, groups)
    return weight, bias


def constant_response(weight: Tensor, value: Tensor, groups: int = 1) -> Tensor:
    """What a conv makes of an input that is constant in each channel, away from a pad.

    ``y[o] = sum_{i, h, w} W[o, i, h, w] v[i]``: the bias term of transform III.

    Args:
        weight: Kernel ``(out, in / groups, kh, kw)``.
        value: The constant of each input channel ``(in,)``.
        groups: The number of groups of the conv.
    """
    taps = weight.sum((2, 3)).reshape(groups, weight.size(0) // groups, -1)
    return (taps @ value.reshape(groups, -1, 1)).flatten()


def concat_depth(branches: Sequence[KernelBias]) -> KernelBias:
    """Merge convs whose outputs are concatenated over channels into one (IV).

    ``conv(x, cat W_i, cat b_i) == cat conv(x, W_i, b_i)``.
    """
    weights, biases = zip(*branches, strict=True)
    return torch.cat(weights), torch.cat(biases)


def average_kernel(
    channels: int,
    kernel_size: tuple[int, int],
    groups: int = 1,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """The kernel of an average pooling (V).

    ``conv(x, W) == avg_pool(x, (kh, kw))`` with ``1 / (kh kw)`` on the diagonal of the
    channels and zero elsewhere.

    Args:
        channels: The number of channels.
        kernel_size: ``(kh, kw)``.
        groups: The groups of the conv that the kernel is for.
        dtype: The kernel's dtype. Default: torch's default dtype.
        device: The kernel's device. Default: torch's default device.

    Returns:
        Kernel ``(channels, channels / groups, kh, kw)``.
    """
    height, width = kernel_size
    eye = identity_kernel(channels, groups, dtype, device)
    return eye.expand(-1, -1, height, width) / (height * width)


def identity_kernel(
    channels: int,
    groups: int = 1,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """The 1x1 kernel of the identity: ``conv(x, W) == x``.

    Args:
        channels: The number of channels.
        groups: The groups of the conv that the kernel is for.
        dtype: The kernel's dtype. Default: torch's default dtype.
        device: The kernel's device. Default: torch's default device.

    Returns:
        Kernel ``(channels, channels / groups, 1, 1)``.
    """
    return scale_kernel(torch.ones(channels, dtype=dtype, device=device), groups)


def scale_kernel(scale: Tensor, groups: int = 1) -> Tensor:
    """The 1x1 kernel that multiplies every channel: ``conv(x, W) == scale x``.

    Args:
        scale: The factors ``(channels,)``.
        groups: The groups of the conv that the kernel is for.

    Returns:
        Kernel ``(channels, channels / groups, 1, 1)``.
    """
    diagonal = scale.reshape(groups, -1).diag_embed()
    return diagonal.flatten(0, 1)[..., None, None]


def pad_kernel(
    weight: Tensor, kernel_size: tuple[int, int], offset: tuple[int, int] | None = None
) -> Tensor:
    """Place a kernel in a larger frame of zeros (VI).

    ``conv(x, W', padding=p + offset) == conv(x, W, padding=p)``, away from the far
    border.

    Args:
        weight: Kernel ``(out, in / groups, kh, kw)``.
        kernel_size: The frame's ``(KH, KW)``.
        offset: The frame's taps ``(top, left)`` before the kernel's first one.
            Default: the middle, which has to exist.

    Raises:
        ValueError: If the kernel does not fit into the frame there.
    """
    spare = [size - own for size, own in zip(kernel_size, weight.shape[2:], strict=True)]
    if offset is None:
        if any(room % 2 for room in spare):
            raise ValueError(
                f'a {tuple(weight.shape[2:])} kernel has no place in the middle of '
                f'{tuple(kernel_size)}: give the offset'
            )
        offset = (spare[0] // 2, spare[1] // 2)
    (top, left), (height, width) = offset, spare
    if not (0 <= top <= height and 0 <= left <= width):
        raise ValueError(
            f'a {tuple(weight.shape[2:])} kernel does not fit into {tuple(kernel_size)} '
            f'at tap {tuple(offset)}'
        )
    if spare == [0, 0]:
        return weight
    return F.pad(weight, (left, width - left, top, height - top))
