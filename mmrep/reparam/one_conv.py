"""Compute linear layers in train form as the one conv that they equal."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, fx, nn

from .fold import LinearConv, computes_as_folded, fold_layer
from .geometry import LINEAR_CONVS, NotFoldableError, Size, conv_geometry
from .transforms import KernelBias

#: Output pixels of a batch from which one conv takes less time than the layers.
#: Deriving a kernel takes the same time for every input; the time saved grows with the
#: pixels. Both grow with the channels, so that the number of pixels alone is a fair rule.
#: Measured on two CPU cores. With a GPU, launching the derivation takes longer than the
#: layers, for batches of up to hundreds of images (benchmarks/results/gpu.md).
AUTO_PIXELS = 400


def one_conv_kernel(
    layers: Iterable[nn.Module],
    derive: Callable[[Size], KernelBias],
    x: Tensor,
    stride: Size,
    one_conv: bool | int | str = 'auto',
) -> KernelBias | None:
    """The kernel and bias of the one conv to compute instead of the layers, or ``None``.

    The layers are computed as one conv if ``one_conv`` allows it for the number of output
    pixels, and if they are linear at this moment: every norm uses running statistics,
    every layer is of a registered type with the forward of that type, and no layer has
    hooks or a parametrization. All of this is checked anew at each call.

    Args:
        layers: The layers; those inside them are checked, too.
        derive: Computes the kernel and the bias of the layers, given the input's size.
        x: The input of the layers ``(N, in, H, W)``.
        stride: The stride of the layers.
        one_conv: ``True`` and ``False`` for always and never, or the number of output
            pixels from which on to use one conv. ``'auto'`` means ``AUTO_PIXELS`` on a
            CPU, and never elsewhere. Default: ``'auto'``.

    Returns:
        ``weight`` and ``bias``, differentiable with respect to the layers' parameters, or
        ``None`` if the layers are to be computed one by one.
    """
    # torch.fx traces with a proxy, whose number of pixels is not known.
    if isinstance(x, fx.Proxy):
        return None
    if one_conv == 'auto':
        one_conv = AUTO_PIXELS if x.device.type == 'cpu' else False
    if one_conv is False:
        return None
    batch, _, *size = x.shape
    pixels = batch * size[0] * size[1] // (stride[0] * stride[1])
    if one_conv is not True and not (isinstance(pixels, int) and pixels >= one_conv):
        return None
    try:
        inside = (module for layer in layers for module in layer.modules())
        return derive(tuple(size)) if all(map(computes_as_folded, inside)) else None
    except NotFoldableError:
        return None


def apply_conv_norm(
    conv: nn.Module, norm: nn.Module, x: Tensor, one_conv: bool | int | str = 'auto'
) -> Tensor:
    """``norm(conv(x))``, computed as one conv where :func:`one_conv_kernel` allows it."""
    if type(conv) not in LINEAR_CONVS:
        return norm(conv(x))
    dtype = torch.promote_types(conv.weight.dtype, torch.float32)

    def derive(size: Size) -> KernelBias:
        start = LinearConv(conv.in_channels, conv.in_channels, dtype, x.device, size)
        folded = fold_layer(norm, fold_layer(conv, start))
        return folded.weight, folded.bias

    kernel = one_conv_kernel((conv, norm), derive, x, conv.stride, one_conv)
    if kernel is None:
        return norm(conv(x))
    weight, bias = (tensor.to(conv.weight.dtype) for tensor in kernel)
    return conv_geometry(conv).convolve(x, weight, bias)
