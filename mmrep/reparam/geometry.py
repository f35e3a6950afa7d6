"""The geometry of a conv, and the conv types whose geometry is known."""

from collections.abc import Container
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

Size = tuple[int, int]


class NotFoldableError(ValueError):
    """Raised for a layer or block that cannot be folded; names it and the reason."""


@dataclass(frozen=True)
class ConvGeometry:
    """The hyperparameters of a 2-d conv: everything but its weight and bias.

    Args:
        in_channels, out_channels: The numbers of channels.
        kernel_size: ``(kh, kw)``.
        stride: Stride over rows and columns, in pixels. Default: 1.
        padding: Rows above and below, columns left and right, in pixels. Default: 0.
        dilation: Distance between the taps, in pixels. Default: 1.
        groups: The number of groups. Default: 1.
        padding_mode: As ``nn.Conv2d``'s, or ``'same'``: zero padding that depends on the
            input's size as TensorFlow's ``'SAME'`` does; ``padding`` is ignored then.
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
    def fill(self) -> str:
        """The padding mode as ``nn.Conv2d`` has it, which is ``'zeros'`` for ``'same'``."""
        return 'zeros' if self.padding_mode == 'same' else self.padding_mode

    @property
    def moves_with_size(self) -> bool:
        """Whether the first tap's place depends on the size of the input."""
        return self.padding_mode == 'same' and max(self.stride) > 1

    def pad(self, input_size: Size | None = None) -> tuple[Size, Size]:
        """The pixels ``(top, bottom), (left, right)`` put around an input.

        Raises:
            NotFoldableError: If they depend on the input's size and none is given.
        """
        if self.padding_mode != 'same':
            (rows, columns) = self.padding
            return (rows, rows), (columns, columns)
        if input_size is None and self.moves_with_size:
            raise NotFoldableError(
                "the padding of a strided conv with 'SAME' padding depends on the size of "
                'its input: run one forward pass first, or give input_size'
            )
        total = [
            max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
            for size, s, k, d in zip(
                # With stride 1 the total is the same for every size.
                input_size or self.kernel_size,
                self.stride,
                self.kernel_size,
                self.dilation,
                strict=True,
            )
        ]
        return tuple((n // 2, n - n // 2) for n in total)

    def start(self, input_size: Size | None = None) -> Size:
        """Row and column of the first tap at output (0, 0): minus the padding."""
        (top, _), (left, _) = self.pad(input_size)
        return -top, -left

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``conv(x, W, b)`` with this geometry; ``x`` is ``(N, in, H, W)``."""
        padding = self.padding
        if self.padding_mode != 'zeros':
            (top, bottom), (left, right) = self.pad(x.shape[2:])
            # The padding before never exceeds that after: if there is none after, skip it.
            if bottom or right:
                mode = 'constant' if self.fill == 'zeros' else self.fill
                x = F.pad(x, (left, right, top, bottom), mode=mode)
            padding = 0
        return F.conv2d(x, weight, bias, self.stride, padding, self.dilation, self.groups)


#: Forward pre-hooks of torch that set the weight of a layer, other than parametrizations.
_WEIGHT_SETTERS = (BasePruningMethod, SpectralNorm, WeightNorm)

#: The conv types that convolve with their ``weight``, each with its padding mode, or
#: ``None`` if its attributes give it.
LINEAR_CONVS: dict[type, str | None] = {}


def known_type(layer: nn.Module, known: Container[type | str]) -> type | str:
    """The type among ``known``, or its full name, that a layer computes as.

    An instance of a subclass computes as the type if it has the type's forward.

    Raises:
        NotFoldableError: If there is none, if the layer has a forward of its own, or if a
            forward hook may change what it computes.
    """
    name = type(layer).__name__
    for kind in type(layer).__mro__:
        key = kind if kind in known else f'{kind.__module__}.{kind.__qualname__}'
        if key in known:
            break
    else:
        raise NotFoldableError(
            f'{name} is not known as a linear layer: if it is one, see register_fold'
        )
    methods = ('forward', '_conv_forward')
    if any(m in vars(layer) for m in methods) or any(
        getattr(type(layer), m, None) is not getattr(kind, m, None) for m in methods
    ):
        raise NotFoldableError(
            f'{name} has a forward of its own, and may not compute what '
            f'{kind.__name__} does'
        )
    before = layer._forward_pre_hooks.values()
    if layer._forward_hooks or not all(isinstance(h, _WEIGHT_SETTERS) for h in before):
        raise NotFoldableError(
            f'{name} has a forward hook, which may change what it computes: remove the hook'
        )
    return key


def is_watched(layer: nn.Module) -> bool:
    """Whether calling a layer does more than the forward of its type.

    The cause can be a hook of its own or one on all modules, a parametrization, or a
    patched forward.
    """
    return bool(
        'forward' in vars(layer)
        or layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
        or is_parametrized(layer)
    )


def linear_conv_type(conv: nn.Module) -> type[nn.Conv2d]:
    """The registered type that a conv computes as: its own type or a base class of it.

    Raises:
        NotFoldableError: If there is none, see ``known_type``.
    """
    return known_type(conv, LINEAR_CONVS)


def conv_geometry(conv: nn.Module) -> ConvGeometry:
    """The geometry of a conv layer whose ``weight`` is what it convolves with.

    Open to new conv types, see :func:`~mmrep.reparam.register_linear_conv`.

    Raises:
        NotFoldableError: If it is not such a conv, or pads unevenly by ``padding='same'``.
    """
    padding_mode = LINEAR_CONVS[linear_conv_type(conv)]
    padding = conv.padding
    if isinstance(padding, str):
        span = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        if padding == 'same' and any(pixels % 2 for pixels in span):
            raise NotFoldableError("padding='same' with an even kernel pads unevenly")
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


def weight_in_eval_mode(layer: nn.Module) -> Tensor:
    """The weight that a layer would compute with in eval mode.

    The weight of a layer that a hook prunes or normalises is that of its last forward pass,
    and its parameters may have changed since. So it is computed again, in eval mode, where
    this changes no other state.
    """
    if not (layer._forward_pre_hooks or is_parametrized(layer)):
        return layer.weight
    modes = {module: module.training for module in layer.modules()}
    layer.eval()
    try:
        for hook in layer._forward_pre_hooks.values():
            if isinstance(hook, _WEIGHT_SETTERS):
                hook(layer, ())
        return layer.weight
    finally:
        for module, training in modes.items():
            module.training = training
