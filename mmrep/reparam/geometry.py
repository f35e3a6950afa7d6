"""The geometry of a conv, and the conv types whose geometry is known."""

from dataclasses import dataclass
from functools import singledispatch

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

Size = tuple[int, int]


class NotFoldableError(ValueError):
    """A layer that is not linear with a known kernel; says which and why."""


@dataclass(frozen=True)
class ConvGeometry:
    """What a 2-d conv does besides multiplying: everything but its tensors.

    Args:
        in_channels: The number of input channels.
        out_channels: The number of output channels.
        kernel_size: ``(kh, kw)``.
        stride: Stride over rows and columns, in pixels. Default: 1.
        padding: Rows above and below, columns left and right, in pixels. Default: 0.
        dilation: Distance between the taps, in pixels. Default: 1.
        groups: The number of groups. Default: 1.
        padding_mode: As ``nn.Conv2d``'s, or ``'same'``: zeros, as many as TensorFlow's
            ``'SAME'`` puts around an input of that size, in the place of ``padding``.
            Default: ``'zeros'``.
    """

    in_channels: int
    out_channels: int
    kernel_size: Size
    stride: Size = (1, 1)
    padding: Size = (0, 0)
    dilation: Size = (1, 1)
    groups: int = 1
    padding_mode: str = 'zeros'

    @property
    def moves_with_size(self) -> bool:
        """Whether the first tap's place depends on the size of the input."""
        return self.padding_mode == 'same' and max(self.stride) > 1

    def pad(self, input_size: Size | None = None) -> tuple[Size, Size]:
        """The pixels ``(top, bottom), (left, right)`` put around an input.

        Raises:
            NotFoldableError: If they depend on the input's size and that is ``None``.
        """
        if self.padding_mode != 'same':
            (rows, columns) = self.padding
            return (rows, rows), (columns, columns)
        if input_size is None and self.moves_with_size:
            raise NotFoldableError(
                "a conv with 'SAME' padding and a stride pads by the size of its input: "
                'run one forward pass first, or give input_size'
            )
        total = [
            max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
            for size, s, k, d in zip(
                # With stride 1 the total is the same for every size.
                input_size or (1, 1),
                self.stride,
                self.kernel_size,
                self.dilation,
                strict=True,
            )
        ]
        return tuple((n // 2, n - n // 2) for n in total)

    def start(self, input_size: Size | None = None) -> Size:
        """Row and column of the first tap at output (0, 0): minus the pad."""
        (top, _), (left, _) = self.pad(input_size)
        return -top, -left

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``conv(x, W, b)`` with this geometry; ``x`` is ``(N, in, H, W)``."""
        padding = self.padding
        if self.padding_mode != 'zeros':
            (top, bottom), (left, right) = self.pad(tuple(x.shape[2:]))
            if top or bottom or left or right:
                mode = 'constant' if self.padding_mode == 'same' else self.padding_mode
                x = F.pad(x, (left, right, top, bottom), mode=mode)
            padding = 0
        return F.conv2d(x, weight, bias, self.stride, padding, self.dilation, self.groups)


@singledispatch
def conv_geometry(layer: nn.Module) -> ConvGeometry:
    """The geometry of a conv layer whose ``weight`` is what it convolves with.

    Open to new conv types by registration, see :func:`register_linear_conv`.

    Raises:
        NotFoldableError: If the layer is no such conv.
    """
    raise NotFoldableError(f'{type(layer).__name__} is no conv with a known, fixed kernel')


def register_linear_conv(
    conv_type: type[nn.Conv2d], padding_mode: str | None = None
) -> None:
    """Declare that a subclass of ``nn.Conv2d`` convolves with its ``weight``.

    That does not hold for subclasses of it with a forward of their own, which may
    convolve with another kernel: a standardised or a deformed one, say.

    Args:
        conv_type: The type.
        padding_mode: How it pads, if that is not what its attributes say; see
            :class:`ConvGeometry`. Default: as they say.
    """

    def geometry(conv: nn.Conv2d) -> ConvGeometry:
        for method in ('forward', '_conv_forward'):
            if getattr(type(conv), method) is not getattr(conv_type, method):
                raise NotFoldableError(
                    f'{type(conv).__name__} does not convolve with its weight as '
                    f'{conv_type.__name__} does'
                )
        return conv2d_geometry(conv, padding_mode)

    conv_geometry.register(conv_type, geometry)


def linear_conv_type(conv: nn.Conv2d) -> type[nn.Conv2d]:
    """The type by whose registration :func:`conv_geometry` knows a conv.

    Not the conv's own where that is a subclass, such as torch makes for a parametrized
    one.
    """
    return next(kind for kind in type(conv).__mro__ if kind in conv_geometry.registry)


#: What sets the weight of a layer before it computes: the ways of torch that are no
#: parametrizations.
_WEIGHT_SETTERS = (BasePruningMethod, SpectralNorm, WeightNorm)


def current_weight(conv: nn.Module) -> Tensor:
    """The weight that a conv would compute with now.

    One that is pruned or normalised by a hook has the weight of its last forward pass, of
    parameters that may have changed since.
    """
    for hook in conv._forward_pre_hooks.values():
        if isinstance(hook, _WEIGHT_SETTERS):
            hook(conv, ())
    return conv.weight


def weight_in_eval_mode(conv: nn.Module) -> Tensor:
    """:func:`current_weight` in eval mode, in which making it changes no state."""
    if not (conv._forward_pre_hooks or is_parametrized(conv)):
        return conv.weight
    modes = {module: module.training for module in conv.modules()}
    conv.eval()
    try:
        return current_weight(conv)
    finally:
        for module, training in modes.items():
            module.training = training


def conv2d_geometry(conv: nn.Conv2d, padding_mode: str | None = None) -> ConvGeometry:
    """The geometry that an ``nn.Conv2d``'s attributes say, whatever its forward does."""
    padding = conv.padding
    if isinstance(padding, str):
        span = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        if padding == 'same' and any(pixels % 2 for pixels in span):
            raise NotFoldableError("padding='same' of an even kernel pads unevenly")
        padding = (0, 0) if padding == 'valid' else (span[0] // 2, span[1] // 2)
    return ConvGeometry(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        padding,
        conv.dilation,
        conv.groups,
        padding_mode or conv.padding_mode,
    )


register_linear_conv(nn.Conv2d)
