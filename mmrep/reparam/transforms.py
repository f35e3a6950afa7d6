"""The transforms of Diverse Branch Block and later papers, as functions of tensors.

The functions take and return the ``weight`` ``(out, in / groups, kh, kw)`` and the ``bias``
``(out,)`` of a convolution; a bias of ``None`` stands for zeros. They allocate in the dtype
and on the device of their inputs, change none of their arguments and are differentiable.
The tensors of a batch norm are ``(channels,)``; ``gamma=None`` stands for ones and
``beta=None`` for zeros.

Numerals refer to section 3.2 of `Diverse Branch Block: Building a Convolution as an
Inception-like Unit <https://arxiv.org/abs/2103.13425>`_; transform IV is not needed here.
"""

import math
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
    """Scale and shift of a batch norm in eval mode: ``bn(x) == scale x + shift``.

    ``scale = gamma / sqrt(var + eps)`` and ``shift = beta - scale mean``.
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


def merge_convs(
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    groups1: int = 1,
    groups2: int = 1,
) -> KernelBias:
    """Merge two convs in a row, one of which is 1x1, into one (III).

    ``conv(x, W', b') == conv(conv(x, W1, b1), W2, b2)`` with
    ``W'[o, c] = sum_i W2[o, i] W1[i, c]`` and ``b'[o] = b2[o] + sum W2[o, i] b1[i]``.
    Exact if the second conv does not pad, or pads with ``b1``, the response of the first to
    zeros.

    Args:
        weight1, bias1: Of the first conv, ``(mid, in / groups1, kh, kw)`` and ``(mid,)``.
        weight2, bias2: Of the second, ``(out, mid / groups2, kh', kw')`` and ``(out,)``.
        groups1, groups2: Their numbers of groups. Default: 1.

    Returns:
        ``weight`` and ``bias`` of a conv with ``gcd(groups1, groups2)`` groups.

    Raises:
        ValueError: If neither kernel is 1x1, or the numbers of channels do not match.
    """
    mid, width = weight1.shape[:2]
    out, one_by_one = weight2.size(0), (1, 1)
    if (
        one_by_one not in (weight1.shape[2:], weight2.shape[2:])
        or mid != weight2.size(1) * groups2
        or mid % groups1
        or out % groups2
    ):
        raise ValueError(
            f'cannot merge a kernel {tuple(weight1.shape)} in {groups1} groups with '
            f'{tuple(weight2.shape)} in {groups2}: one must be 1x1, and the second must '
            'have as many inputs as the first has outputs'
        )
    bias = weight2.new_zeros(out) if bias2 is None else bias2
    if bias1 is not None:
        bias = bias + constant_response(weight2, bias1, groups2)
    # If one conv is depthwise, an entry of the result is one product, not a sum.
    if groups2 == mid == out:
        return weight1 * weight2, bias
    if groups1 == mid and width == 1:
        scales = weight1.reshape(groups2, 1, -1, *weight1.shape[2:])
        weight = weight2.reshape(groups2, out // groups2, -1, *weight2.shape[2:]) * scales
        return weight.flatten(0, 1), bias
    groups = math.gcd(groups1, groups2)
    second = widen_groups(weight2, groups2, groups)
    if weight2.shape[2:] == one_by_one:
        taps, fine, part = weight1.shape[2:], groups1 // groups, mid // groups1
        # Per group of the first conv, without products with the zeros between groups.
        mixer = second.reshape(groups, out // groups, fine, part).transpose(1, 2)
        weight = mixer @ weight1.reshape(groups, fine, part, -1)
        return weight.transpose(1, 2).reshape(out, fine * width, *taps), bias
    first = widen_groups(weight1, groups1, groups)
    width = first.size(1)
    # The kernel of each output is an image that a 1x1 conv maps from mid to in channels:
    # unlike a matrix product, this needs no transposed copies.
    images = second.unflatten(0, (groups, -1)).transpose(0, 1).flatten(1, 2)
    mixer = first.reshape(groups, -1, width).transpose(1, 2).flatten(0, 1)
    weight = F.conv2d(images, mixer[..., None, None], groups=groups)
    return weight.unflatten(1, (groups, width)).transpose(0, 1).flatten(0, 1), bias


def constant_response(weight: Tensor, value: Tensor, groups: int = 1) -> Tensor:
    """The response of a conv to an input that is constant per channel, without padding.

    ``y[o] = sum_{i, h, w} W[o, i, h, w] v[i]``: the bias term of transform III.

    Args:
        weight: The conv's kernel.
        value: The constant of each input channel ``(in,)``.
        groups: The number of groups of the conv. Default: 1.
    """
    taps = weight.sum((2, 3)).reshape(groups, weight.size(0) // groups, -1)
    return (taps @ value.reshape(groups, -1, 1)).flatten()


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
        groups: The groups of the conv that the kernel is for. Default: 1.
        dtype, device: Of the kernel. Default: torch's defaults.

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
    """The 1x1 kernel of the identity: ``conv(x, W) == x``; see :func:`average_kernel`."""
    depthwise = torch.ones(channels, 1, 1, 1, dtype=dtype, device=device)
    return widen_groups(depthwise, channels, groups)


def widen_groups(weight: Tensor, groups: int, fewer: int) -> Tensor:
    """Rewrite the kernel of a grouped conv for a conv with fewer, wider groups.

    ``conv(x, W', groups=fewer) == conv(x, W, groups=groups)``, with zeros between channels
    of different groups.

    Args:
        weight: The kernel.
        groups: The number of its groups.
        fewer: The new number of groups, a divisor of ``groups``.
    """
    if groups == fewer:
        return weight
    out, width, *taps = weight.shape
    merged = groups // fewer
    # (fewer, merged, out / groups, width and taps) gets a diagonal over the merged groups.
    blocks = weight.reshape(fewer, merged, out // groups, -1).movedim(1, -1).diag_embed()
    # Now (fewer, out / groups, width and taps, merged, merged).
    return blocks.permute(0, 3, 1, 4, 2).reshape(out, merged * width, *taps)


def pad_kernel(
    weight: Tensor,
    kernel_size: tuple[int, int],
    offset: tuple[int, int] | None = None,
    step: tuple[int, int] = (1, 1),
) -> Tensor:
    """Zero-pad a kernel to a larger size (VI), with its taps ``step`` apart.

    ``conv(x, W', padding=p + d offset, dilation=d) == conv(x, W, padding=p,
    dilation=step d)`` at all output pixels that both have. A ``step`` above 1 turns a
    dilated kernel into one of smaller dilation, as `UniRepLKNet
    <https://arxiv.org/abs/2311.15599>`_ does in section 3.1.

    Args:
        weight: The kernel.
        kernel_size: The larger size ``(KH, KW)``.
        offset: Zeros ``(top, left)`` before the kernel's first tap.
            Default: as many as after its last tap.
        step: Distance of the kernel's taps in the result, in taps. Default: 1.

    Raises:
        ValueError: If the kernel does not fit there, or has no place in the middle and
            ``offset`` is not given.
    """
    sizes = zip(kernel_size, weight.shape[2:], step, strict=True)
    spare = [size - (own - 1) * apart - 1 for size, own, apart in sizes]
    if offset is None:
        if any(room % 2 for room in spare):
            raise ValueError(
                f'a {tuple(weight.shape[2:])} kernel cannot be in the middle of '
                f'{tuple(kernel_size)}: give the offset'
            )
        offset = (spare[0] // 2, spare[1] // 2)
    (top, left), (height, width) = offset, spare
    if not (0 <= top <= height and 0 <= left <= width):
        raise ValueError(
            f'a {tuple(weight.shape[2:])} kernel, taps {tuple(step)} apart, does not fit '
            f'into {tuple(kernel_size)} at tap {tuple(offset)}'
        )
    padded = weight.new_zeros(*weight.shape[:2], *kernel_size)
    taps_of(padded, weight.shape[2:], offset, step).copy_(weight)
    return padded


def taps_of(
    padded: Tensor,
    kernel_size: Sequence[int],
    offset: tuple[int, int],
    step: tuple[int, int],
) -> Tensor:
    """A view of the taps of a padded kernel at which :func:`pad_kernel` puts the kernel.

    Args:
        padded: The padded kernel ``(out, in / groups, KH, KW)``.
        kernel_size: The kernel's size before padding.
        offset, step: As for :func:`pad_kernel`.
    """
    rows, columns = (
        slice(first, first + (size - 1) * apart + 1, apart)
        for first, size, apart in zip(offset, kernel_size, step, strict=True)
    )
    return padded[:, :, rows, columns]
