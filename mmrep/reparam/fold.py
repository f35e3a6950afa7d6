"""Fold a sequence of linear layers into one conv.

A :class:`LinearConv` is a conv as tensors and geometry. :func:`fold_layer` appends one
layer to it and is open to new layer types by registration::

    @fold_layer.register(MyConv)
    def _(layer, done): ...

Nothing here knows a block: :func:`fold_branches` takes the branches of one and the
geometry of the conv that they are to become.
"""

import copy
from collections.abc import Mapping
from functools import singledispatch
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .geometry import (
    ConvGeometry,
    NotFoldableError,
    Size,
    conv_geometry,
    weight_in_eval_mode,
)
from .transforms import (
    KernelBias,
    add_branches,
    average_kernel,
    bn_affine,
    fuse_bn,
    identity_kernel,
    merge_1x1_kxk,
    pad_kernel,
    scale_kernel,
)


class LinearConv(NamedTuple):
    """A conv under construction: the layers of a branch folded so far.

    Args:
        weight: Kernel ``(out, in / groups, kh, kw)``; ``None`` for the identity.
        bias: Bias ``(out,)``; ``None`` for zeros.
        geometry: Stride, dilation, padding mode, groups and channels.
        dtype: The dtype that tensors of layers are cast to.
        device: The device that tensors of layers are moved to.
        start: Row and column of the first tap at output (0, 0), relative to the input.
        input_size: Size of the block's input in pixels, for layers that depend on it.
        pads_with_response: Whether a padding layer puts around its input what the
            layers before it make of a zero, rather than a zero.
        is_fresh: Whether ``weight`` shares no memory with a layer.
    """

    weight: Tensor | None
    bias: Tensor | None
    geometry: ConvGeometry
    dtype: torch.dtype
    device: torch.device
    start: Size = (0, 0)
    input_size: Size | None = None
    pads_with_response: bool = False
    is_fresh: bool = False

    @classmethod
    def identity(
        cls, channels: int, groups: int, dtype: torch.dtype, device: torch.device
    ) -> 'LinearConv':
        """The conv that changes nothing: where every branch starts."""
        geometry = ConvGeometry(channels, channels, (1, 1), groups=groups)
        return cls(None, None, geometry, dtype, device)

    def cast(self, tensor: Tensor | None) -> Tensor | None:
        """``tensor`` in the dtype and on the device of the computation."""
        return None if tensor is None else tensor.to(self.device, self.dtype)

    def kernel(self) -> Tensor:
        """The weight; of the identity, too."""
        if self.weight is not None:
            return self.weight
        channels, groups = self.geometry.out_channels, self.geometry.groups
        return identity_kernel(channels, groups, self.dtype, self.device)

    def moved(self, start: Size) -> 'LinearConv':
        """This conv, reading its input ``start`` rows and columns further on."""
        return self._replace(start=(self.start[0] + start[0], self.start[1] + start[1]))

    def _check_next(self, geometry: ConvGeometry) -> None:
        """Raise unless a conv of that geometry can follow and be merged."""
        pads_zeros = geometry.padding_mode in ('zeros', 'same') and any(
            map(any, geometry.pad(self.input_size))
        )
        if pads_zeros and self.bias is not None and not self.pads_with_response:
            raise NotFoldableError(
                'a conv pads with zeros what a layer with a bias made before it'
            )
        before = self.geometry
        if self.weight is None:
            return
        if before.kernel_size != (1, 1) or before.stride != (1, 1):
            raise NotFoldableError(
                'only a 1x1 conv of stride 1 can stand before another conv'
            )
        if before.groups != geometry.groups:
            raise NotFoldableError(
                f'convs of {before.groups} and {geometry.groups} groups follow each other'
            )

    def then_conv(
        self, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry
    ) -> 'LinearConv':
        """Append a conv: transform III, or the conv itself after the identity.

        Raises:
            NotFoldableError: If no single conv computes the two.
        """
        self._check_next(geometry)
        weight, bias = self.cast(weight), self.cast(bias)
        if self.weight is not None:
            weight, bias = merge_1x1_kxk(
                self.weight, self.bias, weight, bias, geometry.groups
            )
        appended = self.moved(geometry.start(self.input_size))
        return appended._replace(weight=weight, bias=bias, geometry=geometry)

    def then_average(self, geometry: ConvGeometry) -> 'LinearConv':
        """Append an average pooling of that geometry: transform V, then III.

        Raises:
            NotFoldableError: If no single conv computes the two.
        """
        taps = geometry.kernel_size
        if self.weight is None:
            kernel = average_kernel(
                geometry.out_channels, taps, geometry.groups, self.dtype, self.device
            )
            return self.then_conv(kernel, None, geometry)
        self._check_next(geometry)
        # The average's kernel is diagonal: III has nothing to multiply, every tap is an
        # equal share of the 1x1 kernel, and a constant stays itself.
        kernel = (self.weight / (taps[0] * taps[1])).expand(-1, -1, *taps)
        appended = self.moved(geometry.start(self.input_size))
        return appended._replace(weight=kernel, geometry=geometry, is_fresh=False)

    def then_norm(self, norm: nn.Module) -> 'LinearConv':
        """Append a norm with running statistics: transform I.

        Raises:
            NotFoldableError: On the meta device, where folding is a check, if the norm is
                another function than its tensors say.
        """
        if self.device.type == 'meta':
            _check_norm(norm)
        mean, var, eps, gamma, beta = norm_tensors(norm)
        mean, var, gamma, beta = map(self.cast, (mean, var, gamma, beta))
        if self.weight is None:
            scale, bias = bn_affine(mean, var, eps, gamma, beta)
            weight = scale_kernel(scale, self.geometry.groups)
        else:
            weight, bias = fuse_bn(self.weight, self.bias, mean, var, eps, gamma, beta)
        return self._replace(weight=weight, bias=bias, is_fresh=True)

    def offset_in(self, frame: ConvGeometry) -> Size:
        """The frame's taps before this conv's first one, for transform VI.

        Raises:
            NotFoldableError: If the frame cannot compute this conv.
        """
        own, theirs = self.geometry, frame.start(self.input_size)
        other_dilation = own.dilation != frame.dilation and any(
            size > 1 and mine != other
            for size, mine, other in zip(
                own.kernel_size, own.dilation, frame.dilation, strict=True
            )
        )
        if (
            own.stride != frame.stride
            or own.groups != frame.groups
            or other_dilation
            or (
                own.padding_mode != frame.padding_mode
                and any(map(any, own.pad(self.input_size)))
            )
        ):
            raise NotFoldableError(f'{own} does not fit into the frame {frame}')
        rows, rest_of_rows = divmod(self.start[0] - theirs[0], frame.dilation[0])
        columns, rest_of_columns = divmod(self.start[1] - theirs[1], frame.dilation[1])
        if rest_of_rows or rest_of_columns:
            raise NotFoldableError(
                f'a {own.kernel_size} kernel falls between the taps of the frame {frame}'
            )
        if not (
            0 <= rows <= frame.kernel_size[0] - own.kernel_size[0]
            and 0 <= columns <= frame.kernel_size[1] - own.kernel_size[1]
        ):
            raise NotFoldableError(
                f'a {own.kernel_size} kernel does not fit into {frame.kernel_size} at tap '
                f'{(rows, columns)}'
            )
        return rows, columns


def has_running_statistics(norm: nn.Module) -> bool:
    """Whether a module is a norm that normalises by running statistics in eval mode.

    Judged by what the module has, not by its type, so that batch norms of every origin
    count: ``nn.SyncBatchNorm``, mmcv's, the ones of a user.
    """
    return (
        isinstance(getattr(norm, 'running_mean', None), Tensor)
        and isinstance(getattr(norm, 'running_var', None), Tensor)
        and hasattr(norm, 'eps')
    )


#: Where forwards stand that compute what running statistics say, and nothing else.
_BATCH_NORM_MODULES = (
    'torch.nn.modules.batchnorm',
    'torch.nn.modules.instancenorm',
    'torchvision.ops.misc',
    'mmcv.ops.sync_bn',
)


def is_batch_norm(norm: nn.Module) -> bool:
    """Whether a norm has running statistics and the forward of torch, torchvision or mmcv.

    In eval mode it is the scale and the shift that :func:`bn_affine` makes of its tensors.
    """
    return type(norm).forward.__module__ in _BATCH_NORM_MODULES and has_running_statistics(
        norm
    )


def norm_tensors(
    norm: nn.Module,
) -> tuple[Tensor, Tensor, float, Tensor | None, Tensor | None]:
    """Mean, variance, eps, scale and shift of a norm with running statistics."""
    return (
        norm.running_mean,
        norm.running_var,
        norm.eps,
        # Some have none at all.
        getattr(norm, 'weight', None),
        getattr(norm, 'bias', None),
    )


@singledispatch
def fold_layer(layer: nn.Module, done: LinearConv) -> LinearConv:
    """Append ``layer``, in eval mode, to the conv ``done``.

    Raises:
        NotFoldableError: If the layer is not linear, or not in this place.
    """
    if has_running_statistics(layer):
        return done.then_norm(layer)
    geometry = conv_geometry(layer)
    return done.then_conv(weight_in_eval_mode(layer), layer.bias, geometry)


@fold_layer.register(nn.GroupNorm)
@fold_layer.register(nn.LayerNorm)
@fold_layer.register(nn.modules.batchnorm._NormBase)
def _(norm: nn.Module, done: LinearConv) -> LinearConv:
    if not has_running_statistics(norm):
        raise NotFoldableError(
            f'{type(norm).__name__} without running statistics normalises by its input'
        )
    return done.then_norm(norm)


@torch.no_grad()
def _check_norm(norm: nn.Module) -> None:
    """Raise unless a norm is, in eval mode, the scale and the shift that its tensors say.

    One with a forward of its own is tried out: a copy, in float64, so that nobody's hooks
    see it and no rounding looks like a fault.
    """
    if is_batch_norm(norm) or norm.running_mean.device.type == 'meta':
        return
    name = type(norm).__name__
    try:
        tried = copy.deepcopy(norm).to('cpu', torch.float64).eval()
        for hooks in (tried._forward_hooks, tried._forward_pre_hooks):
            hooks.clear()
        mean, var, eps, gamma, beta = norm_tensors(tried)
        standard = torch.linspace(-3, 3, 8, dtype=torch.float64).reshape(2, 1, 2, 2)
        x = mean.reshape(-1, 1, 1) + standard * (var + eps).sqrt().reshape(-1, 1, 1)
        scale, shift = bn_affine(mean, var, eps, gamma, beta)
        expected = scale.reshape(-1, 1, 1) * x + shift.reshape(-1, 1, 1)
        error = (tried(x) - expected).abs().max()
    except Exception as failure:
        # Its forward is somebody's.
        raise NotFoldableError(
            f'{name} has a forward of its own that fails where it is tried out '
            f'({type(failure).__name__}: {failure})'
        ) from failure
    if not error <= 1e-3 * expected.abs().max():
        raise NotFoldableError(
            f'{name} has running statistics, but is another function of its input than '
            'they say'
        )


@fold_layer.register(nn.Sequential)
def _(sequence: nn.Sequential, done: LinearConv) -> LinearConv:
    for layer in sequence:
        done = fold_layer(layer, done)
    return done


@fold_layer.register(nn.Identity)
def _(layer: nn.Identity, done: LinearConv) -> LinearConv:
    return done


def fold_branches(
    branches: Mapping[str, nn.Module],
    frame: ConvGeometry,
    input_size: Size | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> KernelBias:
    """The one conv that equals the sum of ``branches``, all in eval mode.

    ``frame.convolve(x, W, b) == sum branch(x)``, differentiable with respect to the
    branches' parameters and changing none of them.

    Args:
        branches: The branches by name. Each reads the same input.
        frame: The geometry of the conv that they become.
        input_size: The size of the input in pixels; needed by "SAME" padding with a
            stride only.
        dtype: Dtype of the computation and the result. Default: the parameters', at
            least float32.
        device: Device of the computation and the result; ``'meta'`` checks whether the
            branches can be folded, and computes nothing else than what norms with a
            forward of their own are. Default: the parameters'.

    Returns:
        ``weight`` ``(out, in / groups, kh, kw)`` and ``bias`` ``(out,)``.

    Raises:
        NotFoldableError: If a branch is not linear or does not fit into the frame; says
            which one and why.
    """
    tensor = next(
        chain.from_iterable(
            chain(branch.parameters(), branch.buffers()) for branch in branches.values()
        )
    )
    start = LinearConv.identity(
        frame.in_channels,
        frame.groups,
        dtype or torch.promote_types(tensor.dtype, torch.float32),
        torch.device(device or tensor.device),
    )._replace(input_size=input_size)
    alike: dict[tuple, list[KernelBias]] = {}
    for name, branch in branches.items():
        try:
            folded = fold_layer(branch, start)
            place = folded.offset_in(frame)
        except NotFoldableError as error:
            raise NotFoldableError(f'{name}: {error}') from None
        weight, bias = folded.kernel(), folded.bias
        # Kernels are added in place: not into a parameter.
        weight = weight if folded.is_fresh else weight.clone()
        bias = weight.new_zeros(frame.out_channels) if bias is None else bias
        alike.setdefault((tuple(weight.shape[2:]), place), []).append((weight, bias))
    return _add_in_frame(alike, frame.kernel_size)


def _add_in_frame(
    alike: Mapping[tuple[Size, Size], list[KernelBias]], kernel_size: Size
) -> KernelBias:
    """Transforms II and VI at once: add kernels of a size and a place in the frame.

    Equals ``add_branches`` of every kernel after ``pad_kernel``, but touches the large
    kernels once: small ones are added up first, and then in place.
    """
    merged = {key: add_branches(kernels) for key, kernels in alike.items()}
    whole = merged.pop((kernel_size, (0, 0)), None)
    if whole is None:
        return add_branches(
            [
                (pad_kernel(weight, kernel_size, place), bias)
                for (_, place), (weight, bias) in merged.items()
            ]
        )
    total, bias = whole
    for ((height, width), (top, left)), (weight, part) in merged.items():
        total[:, :, top : top + height, left : left + width] += weight
        bias = bias + part
    return total, bias
