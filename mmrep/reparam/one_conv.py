"""When linear layers in train form compute as the one conv that they equal."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, fx, nn

from .fold import LinearConv, computes_as_folded, fold_layer
from .geometry import LINEAR_CONVS, NotFoldableError, Size, conv_geometry
from .transforms import KernelBias

#: Output pixels of a batch from which one conv takes less time than the layers.
#: Deriving a kernel takes the same for every input; what it saves grows with the pixels.
#: Both grow with the channels, so that the number of pixels alone is a fair rule.
#: Measured on two cores. A GPU waits for the host that derives, which takes longer than the
#: layers up to batches of hundreds of images (benchmarks/results/gpu.md).
AUTO_PIXELS = 400


def one_conv_kernel(
    layers: Iterable[nn.Module],
    derive: Callable[[Size], KernelBias],
    x: Tensor,
    stride: Size,
    one_conv: bool | int | str = 'auto',
) -> KernelBias | None:
    """The kernel and bias that layers compute with instead of one by one, if they do.

    They do where ``one_conv`` allows it for so many pixels, and where they are linear at
    this moment: every norm uses running statistics, every layer is of a type whose
    forward is known, and nobody waits in a hook or a parametrization for a layer to
    compute. All of this is looked up in the modules as they are now.

    Args:
        layers: The layers; those inside them count, too.
        derive: Makes the kernel and the bias of them, given the input's size.
        x: Their input ``(N, in, H, W)``.
        stride: Their stride.
        one_conv: Whether they may: always, never, from so many pixels on, or, by
            ``'auto'``, from ``AUTO_PIXELS`` on, and on a CPU alone.
            Default: ``'auto'``.

    Returns:
        ``weight`` and ``bias`` with gradients to the layers, or ``None``.
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
    """``norm(conv(x))``, by one conv where :func:`one_conv_kernel` says so."""
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
