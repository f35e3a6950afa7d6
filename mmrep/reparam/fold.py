"""Fold a sequence of linear layers into one conv.

A :class:`LinearConv` holds the tensors and the geometry of a conv. :func:`fold_layer`
appends one layer to it and is open to new layer types by registration::

    @register_fold(MyLayer)
    def _(layer, partial): ...

Nothing here depends on the block classes: :func:`fold_branches` takes the branches of a
block and the geometry of the conv that they become.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from .geometry import (
    LINEAR_CONVS,
    ConvGeometry,
    NotFoldableError,
    Size,
    conv_geometry,
    is_watched,
    known_type,
    weight_in_eval_mode,
)
from .transforms import (
    KernelBias,
    add_branches,
    average_kernel,
    bn_affine,
    fuse_bn,
    identity_kernel,
    merge_convs,
    pad_kernel,
    taps_of,
    widen_groups,
)


class LinearConv(NamedTuple):
    """The partial result of folding: one conv that equals the layers folded so far.

    Args:
        in_channels, out_channels: The numbers of channels.
        dtype, device: Of the computation; the tensors of layers are cast to them.
        input_size: Size of the input in pixels, for layers that depend on it.
        weight: Kernel ``(out, in / groups, kh, kw)``; ``None`` for the identity.
        bias: Bias ``(out,)``; ``None`` for zeros.
        kernel_size: Rows and columns of the kernel.
        groups: The number of groups.
        stride, dilation: Over rows and columns, in pixels.
        start: Row and column of the first tap at output (0, 0), relative to the input.
        fill: The padding mode with which the input was padded; ``None`` for no padding.
        cropped: Whether pixels of the input were cut off.
        pads_with_response: Whether zero padding that follows pads with the response of the
            layers so far to a zero input, rather than with zeros.
        is_fresh: Whether ``weight`` is known to share no memory with a layer.
    """

    in_channels: int
    out_channels: int
    dtype: torch.dtype
    device: torch.device
    input_size: Size | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    kernel_size: Size = (1, 1)
    groups: int = 1
    stride: Size = (1, 1)
    dilation: Size = (1, 1)
    start: Size = (0, 0)
    fill: str | None = None
    cropped: bool = False
    pads_with_response: bool = False
    is_fresh: bool = False

    @property
    def is_pointwise(self) -> bool:
        """Whether the kernel is 1x1 and the stride 1."""
        return self.kernel_size == (1, 1) and self.stride == (1, 1)

    def cast(self, tensor: Tensor | None) -> Tensor | None:
        """``tensor`` in the dtype and on the device of the computation."""
        return None if tensor is None else tensor.to(self.device, self.dtype)

    def _as(self, geometry: ConvGeometry) -> 'LinearConv':
        names = ('out_channels', 'kernel_size', 'groups', 'stride', 'dilation')
        return self._replace(**{name: getattr(geometry, name) for name in names})

    def kernel(self, groups: int) -> Tensor:
        """The weight ``(out, in / groups, kh, kw)`` for a conv with ``groups`` groups.

        Raises:
            NotFoldableError: If ``groups`` does not divide this conv's number of groups.
        """
        if self.weight is None:
            return identity_kernel(self.in_channels, groups, self.dtype, self.device)
        if self.groups % groups:
            raise NotFoldableError(
                f'a conv of {self.groups} groups cannot become one of {groups} groups'
            )
        return widen_groups(self.weight, self.groups, groups)

    def then_pad(self, rows: Size, columns: Size, fill: str) -> 'LinearConv':
        """Append a padding: pixels above and below, left and right; cropped if negative.

        Args:
            rows: Pixels above and below.
            columns: Pixels left and right.
            fill: A padding mode of ``nn.Conv2d``.

        Raises:
            NotFoldableError: If no single conv computes the result.
        """
        pixels = {*rows, *columns}
        if not any(pixels):
            return self
        shifted = self._replace(start=(self.start[0] - rows[0], self.start[1] - columns[0]))
        if not self.is_pointwise:
            raise NotFoldableError('only a 1x1 conv of stride 1 can stand before a padding')
        if max(pixels) <= 0:
            return shifted._replace(cropped=True)
        if fill == 'zeros' and self.bias is not None and not self.pads_with_response:
            raise NotFoldableError(
                'it pads with zeros the output of a layer with a bias, which no single '
                'conv does'
            )
        # Two reflect or circular paddings do not equal a larger one.
        composes = self.fill is None or self.fill == fill in ('zeros', 'replicate')
        if self.cropped or not composes:
            raise NotFoldableError(
                f'it pads in mode {fill!r} a map that was padded or cropped before'
            )
        return shifted._replace(fill=fill, cropped=min(pixels) < 0)

    def then_conv(
        self, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry
    ) -> 'LinearConv':
        """Append a conv by transform III; after the identity, take the conv itself.

        Raises:
            NotFoldableError: If no single conv computes the two.
        """
        if geometry.moves_with_size and (self.fill is not None or self.cropped):
            raise NotFoldableError(
                "the padding of a strided conv with 'SAME' padding depends on the size of "
                'a map that was padded or cropped before'
            )
        before = self.then_pad(*geometry.pad(self.input_size), geometry.fill)
        weight, bias = self.cast(weight), self.cast(bias)
        if self.weight is None:
            return before._as(geometry)._replace(weight=weight, bias=bias)
        if not (self.is_pointwise or geometry.kernel_size == (1, 1)):
            raise NotFoldableError(
                f'a {self.kernel_size} conv of stride {self.stride} and a '
                f'{geometry.kernel_size} conv follow each other: one must be 1x1, with '
                'stride 1 if it is the first'
            )
        merged = merge_convs(
            self.weight, self.bias, weight, bias, self.groups, geometry.groups
        )
        no_bias = self.bias is None and bias is None
        (rows, columns), (down, right) = self.stride, geometry.stride
        spatial = geometry if self.is_pointwise else self
        return before._replace(
            out_channels=geometry.out_channels,
            weight=merged[0],
            bias=None if no_bias else merged[1],
            kernel_size=spatial.kernel_size,
            groups=math.gcd(self.groups, geometry.groups),
            stride=(rows * down, columns * right),
            dilation=spatial.dilation,
            is_fresh=True,
        )

    def then_average(self, geometry: ConvGeometry, taps: int | None = None) -> 'LinearConv':
        """Append an average pooling: transform V, then III.

        Args:
            geometry: The pooling's geometry; its channels and groups do not matter.
            taps: Divisor of the sum over the taps. Default: the number of taps.

        Raises:
            NotFoldableError: If no single conv computes the two.
        """
        channels, size = self.out_channels, geometry.kernel_size
        kernel = average_kernel(channels, size, channels, self.dtype, self.device)
        if taps is not None:
            kernel = kernel * (size[0] * size[1] / taps)
        geometry = replace(geometry, out_channels=channels, groups=channels)
        return self.then_conv(kernel, None, geometry)

    def then_scale(self, scale: Tensor, shift: Tensor | None = None) -> 'LinearConv':
        """Append ``y = scale x + shift``, both ``(out,)``."""
        bias = shift
        if self.bias is not None:
            bias = self.bias * scale if shift is None else shift + self.bias * scale
        if self.weight is None:
            weight, groups = scale.reshape(-1, 1, 1, 1), self.in_channels
        else:
            weight, groups = self.weight * scale.reshape(-1, 1, 1, 1), self.groups
        return self._replace(weight=weight, bias=bias, groups=groups, is_fresh=True)

    def then_norm(self, norm: nn.Module) -> 'LinearConv':
        """Append a norm with running statistics: transform I.

        Raises:
            NotFoldableError: If the norm has none and normalises by its input's statistics.
        """
        if not has_running_statistics(norm):
            raise NotFoldableError(
                f'{type(norm).__name__} without running statistics normalises by the '
                'statistics of its input'
            )
        mean, var, eps, gamma, beta = norm_tensors(norm)
        mean, var, gamma, beta = map(self.cast, (mean, var, gamma, beta))
        if self.weight is None:
            return self.then_scale(*bn_affine(mean, var, eps, gamma, beta))
        weight, bias = fuse_bn(self.weight, self.bias, mean, var, eps, gamma, beta)
        return self._replace(weight=weight, bias=bias, is_fresh=True)

    def place_in(self, target: ConvGeometry) -> tuple[Size, Size]:
        """Where this conv's taps lie in the kernel of a larger conv, for transform VI.

        Args:
            target: The geometry of the larger conv.

        Returns:
            The offset of this kernel's first tap, and the step from one of its taps to the
            next, each over rows and columns in taps of the larger kernel.

        Raises:
            NotFoldableError: If a conv of that geometry cannot compute this one.
        """
        agrees = (
            self.stride == target.stride
            and self.fill in (None, target.fill)
            and self.out_channels == target.out_channels
        )
        places = []
        for own, start, dilation, size, first, apart in zip(
            self.kernel_size,
            self.start,
            self.dilation,
            target.kernel_size,
            target.start(self.input_size),
            target.dilation,
            strict=True,
        ):
            offset, rest = divmod(start - first, apart)
            taps_after, last = own - 1, size - 1
            # The dilation of a single tap does not matter.
            step = max(dilation // apart, 1)
            on_taps = rest == 0 and (own == 1 or dilation % apart == 0)
            agrees &= on_taps and 0 <= offset <= last - taps_after * step
            # With 'SAME', an odd and an even kernel are aligned for one input size only.
            uneven = dilation * taps_after % 2 != apart * last % 2
            agrees &= not (uneven and own > 1 and target.moves_with_size)
            places.append((offset, step))
        if not agrees:
            raise NotFoldableError(
                f'a {self.kernel_size} kernel with first tap {self.start}, dilation '
                f'{self.dilation}, stride {self.stride}, {self.out_channels} outputs, '
                f'padded with {self.fill or "nothing"}, does not fit into {target}'
            )
        return tuple(zip(*places, strict=True))


def has_running_statistics(norm: nn.Module) -> bool:
    """Whether a module is a norm that normalises by running statistics in eval mode.

    Decided by the attributes that the module has now, not by its type, so that all batch
    norms count: ``nn.SyncBatchNorm``, mmcv's and those of users.
    """
    return (
        isinstance(getattr(norm, 'running_mean', None), Tensor)
        and isinstance(getattr(norm, 'running_var', None), Tensor)
        and hasattr(norm, 'eps')
        # Without this flag an instance norm ignores its buffers; a batch norm uses them.
        and not (isinstance(norm, _InstanceNorm) and not norm.track_running_stats)
    )


def norm_tensors(
    norm: nn.Module,
) -> tuple[Tensor, Tensor, float, Tensor | None, Tensor | None]:
    """Mean, variance, eps, scale and shift of a norm with running statistics."""
    # Some norms have neither, and a pruned one has the weight of its last forward pass.
    weight = weight_in_eval_mode(norm) if hasattr(norm, 'weight') else None
    bias = getattr(norm, 'bias', None)
    return norm.running_mean, norm.running_var, norm.eps, weight, bias


Fold = Callable[[nn.Module, LinearConv], LinearConv]

#: The functions that append layers, by the layer's type or the type's full name.
_FOLDS: dict[type[nn.Module] | str, Fold] = {}
#: The types among them that compute another function in train mode.
_EVAL_ONLY: set[type[nn.Module] | str] = set()


def register_fold(
    *kinds: type[nn.Module] | str, eval_only: bool = False
) -> Callable[[Fold], Fold]:
    """Declare how layers of a type are appended to a conv; see :func:`fold_layer`.

    ``function(layer, partial)`` returns ``partial`` followed by the layer in eval mode.
    Subclasses count, except for those with a forward of their own.

    Args:
        kinds: The types; a string is the full name of a type that is not imported here.
        eval_only: Whether the layer computes another function in train mode.
            Default: False.
    """

    def register(function: Fold) -> Fold:
        _FOLDS.update(dict.fromkeys(kinds, function))
        if eval_only:
            _EVAL_ONLY.update(kinds)
        return function

    return register


def register_linear_conv(
    conv_type: type[nn.Conv2d], padding_mode: str | None = None
) -> None:
    """Declare that a subclass of ``nn.Conv2d`` convolves with its ``weight``.

    Its subclasses count, except for those with a forward of their own, which may convolve
    with another kernel, such as a standardised or a deformed one.

    Args:
        conv_type: The type.
        padding_mode: Its padding mode, if not that of its attributes; see
            :class:`ConvGeometry`. Default: that of its attributes.
    """
    LINEAR_CONVS[conv_type] = padding_mode
    _FOLDS[conv_type] = _fold_conv


def fold_layer(layer: nn.Module, partial: LinearConv) -> LinearConv:
    """Append ``layer``, in eval mode, to ``partial``, the conv of the layers before it.

    Raises:
        NotFoldableError: If the layer is not linear, or cannot follow those before it.
    """
    return _FOLDS[known_type(layer, _FOLDS)](layer, partial)


def computes_as_folded(layer: nn.Module) -> bool:
    """Whether a layer computes, in its current mode, what :func:`fold_layer` folds.

    A layer with hooks or a parametrization does not: the folded conv would not run them.

    Raises:
        NotFoldableError: If the layer cannot be folded.
    """
    if is_watched(layer):
        return False
    eval_only = layer.training and (
        isinstance(layer, _NormBase) or known_type(layer, _FOLDS) in _EVAL_ONLY
    )
    return not eval_only


def _fold_conv(conv: nn.Module, partial: LinearConv) -> LinearConv:
    return partial.then_conv(weight_in_eval_mode(conv), conv.bias, conv_geometry(conv))


register_linear_conv(nn.Conv2d)


@register_fold(nn.GroupNorm, nn.LayerNorm, 'torchvision.ops.misc.FrozenBatchNorm2d')
@register_fold(_BatchNorm, nn.SyncBatchNorm, _InstanceNorm)
@register_fold('mmcv.ops.sync_bn.SyncBatchNorm', eval_only=True)
def fold_norm(norm: nn.Module, partial: LinearConv) -> LinearConv:
    """Append a norm that uses running statistics in eval mode.

    Pass it to :func:`register_fold` for a norm type of your own.
    """
    return partial.then_norm(norm)


@register_fold(nn.Sequential)
def _(sequence: nn.Sequential, partial: LinearConv) -> LinearConv:
    for layer in sequence:
        partial = fold_layer(layer, partial)
    return partial


@register_fold(nn.Identity)
@register_fold(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout, eval_only=True)
def fold_identity(layer: nn.Module, partial: LinearConv) -> LinearConv:
    """Append a layer that does nothing in eval mode."""
    return partial


@register_fold(nn.ZeroPad2d)
def _(layer: nn.ZeroPad2d, partial: LinearConv) -> LinearConv:
    left, right, top, bottom = layer.padding
    return partial.then_pad((top, bottom), (left, right), 'zeros')


@register_fold(nn.AvgPool2d)
def _(layer: nn.AvgPool2d, partial: LinearConv) -> LinearConv:
    size, stride, padding = map(
        nn.modules.utils._pair, (layer.kernel_size, layer.stride, layer.padding)
    )
    if any(padding) and not layer.count_include_pad:
        raise NotFoldableError(
            'AvgPool2d with count_include_pad=False does not average over the padding'
        )
    if layer.ceil_mode and stride != (1, 1):
        raise NotFoldableError('AvgPool2d with ceil_mode averages fewer pixels at an edge')
    channels = partial.out_channels
    geometry = ConvGeometry(channels, channels, size, stride, padding)
    return partial.then_average(geometry, layer.divisor_override)


def fold_branches(
    branches: Mapping[str, nn.Module],
    target: ConvGeometry,
    input_size: Size | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> LinearConv:
    """The one conv that equals the sum of ``branches``, all in eval mode.

    ``target.convolve(x, W, b) == sum branch(x)``. The result is differentiable with respect
    to the branches' parameters, and none of them is changed. A layer after the sum, such as
    a norm, can be appended by :func:`fold_layer`.

    Args:
        branches: The branches by name. Each reads the same input.
        target: The geometry of the conv that they become.
        input_size: The size of the input in pixels; needed only for 'SAME' padding with a
            stride.
        dtype: Dtype of the computation and the result. Default: the parameters', at
            least float32.
        device: Device of the computation and the result; ``'meta'`` checks whether the
            branches can be folded, and computes nothing. Default: the parameters'.

    Returns:
        ``weight`` ``(out, in / groups, kh, kw)``, ``bias`` ``(out,)`` and the target
        geometry.

    Raises:
        NotFoldableError: If a branch is not linear or does not fit into the target;
            says which one and why.
    """
    tensors = [
        tensor
        for branch in branches.values()
        for tensor in (*branch.parameters(), *branch.buffers())
    ]
    tensor = tensors[0] if tensors else torch.tensor(())
    start = LinearConv(
        target.in_channels,
        target.in_channels,
        dtype or torch.promote_types(tensor.dtype, torch.float32),
        torch.device(device or tensor.device),
        input_size,
    )
    alike: dict[tuple, list[KernelBias]] = {}
    for name, branch in branches.items():
        try:
            folded = fold_layer(branch, start)
            place = folded.place_in(target)
            weight = folded.kernel(target.groups)
        except NotFoldableError as error:
            raise NotFoldableError(f'{name}: {error}') from None
        bias = folded.bias
        # Kernels are added up in place, which must not change a parameter.
        weight = weight if folded.is_fresh else weight.clone()
        bias = weight.new_zeros(target.out_channels) if bias is None else bias
        alike.setdefault((folded.kernel_size, *place), []).append((weight, bias))
    weight, bias = _add_kernels(alike, target.kernel_size)
    place = dict(start=target.start(input_size), fill=target.fill)
    return start._as(target)._replace(weight=weight, bias=bias, **place)


def _add_kernels(
    alike: Mapping[tuple[Size, Size, Size], list[KernelBias]], kernel_size: Size
) -> KernelBias:
    """Add kernels of different sizes and places in the target: transforms VI and II.

    Equals ``pad_kernel`` of every kernel and then ``add_branches``, but with fewer passes
    over large kernels: kernels of the same size and place are added up first, and their
    sum is added to the large kernel in place.
    """
    merged = {key: add_branches(kernels) for key, kernels in alike.items()}
    whole = kernel_size, (0, 0), (1, 1)
    first = whole if whole in merged else next(iter(merged))
    total, bias = merged.pop(first)
    if first != whole:
        total = pad_kernel(total, kernel_size, *first[1:])
    for (size, *place), (weight, part) in merged.items():
        try:
            taps_of(total, size, *place).add_(weight)
        except RuntimeError:
            # torch.func.vmap cannot add a batched kernel in place to one without a batch.
            total = total + pad_kernel(weight, kernel_size, *place)
        bias = bias + part
    return total, bias
