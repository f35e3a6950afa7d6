"""Verify every block of a model on its own: its fused conv against its branches.

The outputs of a model say little about a block where a head hides the backbone, or where
a deep network amplifies rounding errors. A block on its own is an affine function of its
input, or nearly so, and is compared on inputs large enough for every tap of its kernel.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf, isnan
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .deploy import reparam_blocks
from .equivalence import cannot_compare, flatten_outputs
from .foreign import fused_parts, is_inside
from .geometry import ConvGeometry, NotFoldableError, Size, conv_geometry

#: Size of a seeded input, and by how much it exceeds the kernel, in pixels; both at least.
_PIXELS, _FREE = 8, 4

#: Errors of a channel are relative to its own response, or to this fraction of the mean
#: response if that is larger: zeros in theory are rounding noise in practice.
_FLOOR = 1e-6

#: Below this fraction of the bias, a difference from it is a rounding error of float64.
_LOST = 1e-10

#: Lower limit of the scale to which errors are relative where a block adds to its input of
#: unit scale: rounding an identity in a float32 kernel is an error of 1e-5 of this.
_IDENTITY = 6e-3

#: Scales of the noise for a block of another package, tried in turn: an activation in it
#: may set smaller values to zero.
_SCALES = (1, 10, 100)


@dataclass(frozen=True)
class BlockDifference:
    """How far a fused block is from its branches, as relative L2 errors.

    Of a block of mmrep, only the part that is fused is compared, without the SE layer and
    the activation that both forms have.

    Args:
        kernel: Error of the response to seeded noise minus the response to zeros, in
            float64: of the worst channel, or, for a block of another package, of all
            channels together.
        bias: Error of the response to zeros, likewise.
        seen: Error of the output for the input that the block got from the model, in the
            model's dtype, against the branches in float64. ``None`` if it got none.
        branches_seen: The same error for the branches in the model's dtype.
        note: What the comparison does not cover, for a block of another package.
    """

    kernel: float
    bias: float
    seen: float | None = None
    branches_seen: float | None = None
    note: str = ''

    @property
    def worst(self) -> float:
        """The largest error of fusing in float64, without rounding in a forward pass."""
        return max(self.kernel, self.bias)

    def is_within(self, rtol: float, dtype: torch.dtype = torch.float32) -> bool:
        """Whether the fused block equals its branches up to unavoidable rounding errors.

        In float64, the errors must be at most ``rtol / 10``, or 8 eps of ``dtype``, to
        which the kernel is rounded, if that is larger. In the model's dtype, where the sum
        of the branches can itself be off by more than ``rtol``, the error must be at most
        ``rtol``, 8 eps, or twice the error of the branches, whichever is largest.
        """
        eps = 8 * torch.finfo(dtype).eps
        return self.worst <= max(rtol / 10, eps) and (self.seen or 0.0) <= max(
            rtol, eps, 2 * (self.branches_seen or 0.0)
        )


class _Responses(NamedTuple):
    """The outputs of one block: in float64, and of the seen input in the model's dtype."""

    seeded: Tensor
    zeros: Tensor
    seen: Tensor | None


def map_tensors(values: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nested values with ``change(x)`` for every floating-point tensor ``x``."""
    if _is_real(values):
        return change(values)
    if isinstance(values, Mapping):
        return {key: map_tensors(value, change) for key, value in values.items()}
    if isinstance(values, tuple | list):
        changed = [map_tensors(value, change) for value in values]
        # A named tuple takes its fields one by one.
        return (
            type(values)(*changed) if hasattr(values, '_fields') else type(values)(changed)
        )
    return values


class Call(NamedTuple):
    """The arguments of one call of a module."""

    args: tuple
    kwargs: Mapping[str, Any]

    @property
    def size(self) -> Size:
        """Rows and columns of the first argument, the feature map."""
        first, *_ = (*self.args, *self.kwargs.values())
        return first.shape[2:]

    def map(self, change: Callable[[Tensor], Tensor]) -> 'Call':
        """The same call with ``change(x)`` for every floating-point tensor ``x``."""
        return map_tensors(self, change)


class _Inputs(NamedTuple):
    """The inputs of one block: noise, zeros, and what it got from the model."""

    seeded: Call
    zeros: Call
    seen: Call | None


class BlockReference(NamedTuple):
    """The inputs and outputs of a block in train form, for :func:`compare_block`."""

    inputs: _Inputs
    responses: _Responses
    exact: Tensor | None
    by_channel: bool
    note: str


class _PlainUnit(nn.Sequential):
    """A conv or a block, with the norm after it if it has one."""


class _Linear(nn.Module):
    """The part of a block that is fused, as a module."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block.linear(x)


def verifiable_blocks(
    model: nn.Module, norms: Mapping[str, str | None] = {}
) -> dict[str, nn.Module]:
    """The parts of a model that fusing replaces, by name, each as a module.

    They are the blocks that :func:`~mmrep.reparam.reparam_blocks` finds, except those
    inside another block; the convs, with their norms, that ``plain_units()`` of a module
    returns; and the blocks and convs in ``norms``, which maps the name of each to the name
    of the norm after it, or to ``None``.
    """
    blocks: dict[str, nn.Module] = {}
    for name, block in reparam_blocks(model).items():
        # Outer blocks come first.
        if not any(is_inside(outer, name) for outer in blocks):
            own = all(
                hasattr(block, part) for part in ('check_foldable', 'linear', 'geometry')
            )
            blocks[name] = _Linear(block) if own else block
    for owner, module in model.named_modules():
        if callable(getattr(module, 'plain_units', None)):
            for name, layers in module.plain_units().items():
                blocks[_joined_name(owner, name)] = _PlainUnit(*layers)
    for name, norm in norms.items():
        first = _find(model, blocks, name)
        after = () if norm is None else (model.get_submodule(norm),)
        blocks[name] = _PlainUnit(first, *after)
    return blocks


@contextmanager
def seen_inputs(model: nn.Module) -> Iterator[dict[str, Call]]:
    """Record the arguments of each block's first call while the context is open.

    The keys are the names of :func:`verifiable_blocks`, in the order of the calls, and the
    names of the parts that a block of another package fuses one by one
    (:func:`~mmrep.reparam.fused_parts`).
    """
    seen: dict[str, Call] = {}
    names = []
    for name, block in verifiable_blocks(model).items():
        names.append(name)
        if not isinstance(block, _Linear | _PlainUnit):
            names += [_joined_name(name, part) for part in fused_parts(block)]

    def see(name: str, args: tuple, kwargs: dict) -> None:
        seen.setdefault(name, Call(args, kwargs))

    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, kwargs, name=name: see(name, args, kwargs), with_kwargs=True
        )
        for name in names
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _joined_name(*names: str) -> str:
    return '.'.join(filter(None, names))


def _find(model: nn.Module, blocks: Mapping[str, nn.Module], name: str) -> nn.Module:
    """The block of that name, or else the submodule of that name."""
    return blocks[name] if name in blocks else model.get_submodule(name)


@torch.no_grad()
def block_references(
    model: nn.Module,
    seen: Mapping[str, Call],
    seed: int = 0,
    norms: Mapping[str, str | None] = {},
) -> dict[str, BlockReference]:
    """Compute the references with which :func:`compare_blocks` compares the fused blocks.

    The model must be in train form and in eval mode, and its blocks must compute branch by
    branch (:func:`~mmrep.reparam.branch_by_branch`).

    Args:
        model: The model.
        seen: The calls that :func:`seen_inputs` recorded.
        seed: Seed of the noise. Default: 0.
        norms: Names of norms, each by the name of the block before it. The two are
            compared as one, because the norm gets the block's bias. Default: none.

    Raises:
        ValueError: If a block got no input and needs one, because it is of another package
            or its padding depends on the input size; if a block cannot compute in float64;
            or if an output is not finite. The message names the block.
    """
    references = {}
    blocks = verifiable_blocks(model, norms)
    # In the order of the calls, so that an error names the first block that fails.
    for name in dict.fromkeys([*seen, *blocks]):
        with _naming(name):
            block = _find(model, blocks, name)
            references[name] = _reference(block, seen.get(name), seed)
    return references


def _reference(block: nn.Module, seen: Call | None, seed: int) -> BlockReference:
    geometry = _geometry(block)
    if seen is None and (geometry is None or geometry.moves_with_size):
        raise ValueError(
            'the input does not reach it, and it cannot be verified without an input'
        )
    # Before the responses, whose last call is in the block's own dtype: pruning and
    # hook-based weight norms keep the weight of the last call in the layer.
    exact = None if seen is None else _in_float64(block, seen)
    if geometry is None:
        inputs, responses, note = _foreign_responses(block, seen, seed)
    else:
        size = (1, geometry.in_channels, *_size(geometry, seen))
        inputs = _inputs(block, Call((torch.empty(size),), {}), seen, seed)
        responses, note = _respond(block, inputs, by_channel=True), ''
    if not all(response.isfinite().all() for response in responses if response is not None):
        raise ValueError('its output is not finite')
    return BlockReference(inputs, responses, exact, geometry is not None, note)


def _foreign_responses(
    block: nn.Module, seen: Call, seed: int
) -> tuple[_Inputs, _Responses, str]:
    """Call a block of another package with inputs that exercise all of it, if possible.

    Every tap of its kernels reads pixels, if the block accepts maps of that size, and the
    noise is scaled up until the output varies, in case an activation cuts off at zero.

    Returns:
        Its inputs, its outputs, and a note on what they do not cover.
    """

    def observed(call: Call, scale: float) -> tuple[_Inputs, _Responses]:
        inputs = _inputs(block, call, seen, seed, scale)
        return inputs, _respond(block, inputs, by_channel=False)

    call, note = _widened(block, seen), ''
    for scale in _SCALES:
        try:
            inputs, responses = observed(call, scale)
        except Exception:
            # It may accept one input size only, and raise any exception for another.
            inputs, responses = observed(seen, scale)
            note = 'it accepts no larger input, so some taps of kernels may not be compared'
        varying = responses.seeded - responses.zeros
        added = _added(inputs, varying, by_channel=False)
        if _size_of(varying if added is None else added) > _LOST:
            return inputs, responses, note
    return (
        inputs,
        responses,
        'its output does not depend on its input, so its kernels are not compared',
    )


def _widened(block: nn.Module, seen: Call) -> Call:
    """Enlarge the maps of a call until every tap of a block's kernels reads pixels."""
    spans = [
        apart * taps
        for module in block.modules()
        if isinstance(module, nn.Conv2d)
        for apart, taps in zip(module.dilation, module.kernel_size, strict=True)
    ]
    least = 2 * max(spans, default=0)

    def widen(x: Tensor) -> Tensor:
        if x.dim() != 4:
            return x
        # A multiple of the size is divisible by whatever the size is divisible by.
        return x.repeat(1, 1, *(max(1, -(-least // size)) for size in x.shape[2:]))

    return seen.map(widen)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Turn any exception into a ``ValueError`` that names the block."""
    try:
        yield
    except Exception as error:
        kind = '' if isinstance(error, ValueError) else f'{type(error).__name__}: '
        line = str(error).partition('\n')[0]
        raise ValueError(f'{name or "the block"}: {kind}{line}') from error


@torch.no_grad()
def compare_block(reference: BlockReference, block: nn.Module) -> BlockDifference:
    """Compare a fused block with its train form.

    Args:
        reference: The inputs and outputs of its train form.
        block: The module of the same name in :func:`verifiable_blocks` of the deploy form.

    Raises:
        ValueError: If an output has another shape than in train form.
    """
    inputs, expected, exact, by_channel, note = reference
    actual = _respond(block, inputs, by_channel)
    varying = expected.seeded - expected.zeros
    # Beside a large bias, float64 loses a response that is smaller.
    least = max(_FLOOR * _size_of(varying), _LOST * _size_of(expected.zeros))
    kernel = _error(
        varying,
        actual.seeded - actual.zeros,
        least,
        by_channel,
        _added(inputs, varying, by_channel),
    )
    bias = _error(expected.zeros, actual.zeros, _FLOOR * _size_of(varying), by_channel)
    if exact is None:
        return BlockDifference(kernel, bias)
    seen, branches_seen = (
        _error(exact, output, least) for output in (actual.seen, expected.seen)
    )
    return BlockDifference(kernel, bias, seen, branches_seen, note)


def compare_blocks(
    references: Mapping[str, BlockReference],
    model: nn.Module,
    norms: Mapping[str, str | None] = {},
) -> dict[str, BlockDifference]:
    """Compare every block of a model in deploy form with its reference, by name.

    Args:
        references: What :func:`block_references` returned for the train form.
        model: The model in deploy form.
        norms: For each conv that replaced a block, by the conv's name, the name of the
            norm that belongs to it, or ``None``. Default: none.

    Raises:
        ValueError: If a block is missing, or an output has another shape.
    """
    blocks = verifiable_blocks(model, norms)
    there = {name for name, _ in model.named_modules()}
    if missing := references.keys() - there:
        raise ValueError(f'the deploy form has no module named {min(missing)}')
    differences = {}
    for name, reference in references.items():
        with _naming(name):
            differences[name] = compare_block(reference, _find(model, blocks, name))
    return differences


def _geometry(block: nn.Module) -> ConvGeometry | None:
    """The geometry of the conv that a block becomes; ``None`` if it is not known."""
    unit = isinstance(block, _PlainUnit)
    block = block[0] if unit else block
    if isinstance(block, _Linear):
        return block.block.geometry
    try:
        return conv_geometry(block) if unit else None
    except NotFoldableError:
        return None


def _inputs(
    block: nn.Module, like: Call, seen: Call | None, seed: int, scale: float = 1
) -> _Inputs:
    """Seeded noise and zeros with the shapes of the tensors in ``like``."""
    generator = torch.Generator().manual_seed(seed)
    device = next((tensor.device for tensor in _tensors(block).values()), None)

    def draw(tensor: Tensor) -> Tensor:
        # Drawn on the CPU, so that a seed gives the same numbers on every device.
        return scale * torch.randn(tensor.shape, generator=generator).to(device)

    seeded = like.map(draw)
    return _Inputs(seeded, seeded.map(torch.zeros_like), seen)


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _size(geometry: ConvGeometry, seen: Call | None) -> list[int]:
    """Rows and columns of an input in which every tap of the kernel reads pixels."""
    sizes = []
    for axis, (taps, apart, stride, padding) in enumerate(
        zip(
            geometry.kernel_size,
            geometry.dilation,
            geometry.stride,
            geometry.padding,
            strict=True,
        )
    ):
        # Reflect padding must be smaller than the input.
        size = max(_PIXELS, apart * (taps - 1) + 1 + max(_FREE, stride), padding + 1)
        if geometry.moves_with_size:
            # The kernel is fused for the padding of sizes with the same remainder.
            size += (seen.size[axis] - size) % stride
        sizes.append(size)
    return sizes


def _respond(block: nn.Module, inputs: _Inputs, by_channel: bool) -> _Responses:
    if by_channel:
        # Both images in one batch: most of the time goes into the weights.
        images = torch.cat([inputs.seeded.args[0], inputs.zeros.args[0]])
        seeded, zeros = _in_float64(block, Call((images,), {})).split(1)
    else:
        seeded, zeros = (_in_float64(block, c) for c in (inputs.seeded, inputs.zeros))
    if inputs.seen is None:
        return _Responses(seeded, zeros, None)
    # Copies, because a block may change its input in place.
    args, kwargs = inputs.seen.map(torch.clone)
    return _Responses(seeded, zeros, _joined(block(*args, **kwargs)))


def _tensors(block: nn.Module) -> dict[str, Tensor]:
    return dict(block.named_parameters()) | dict(block.named_buffers())


def _in_float64(block: nn.Module, call: Call) -> Tensor:
    tensors = _tensors(block).items()
    wide = {name: tensor.double() for name, tensor in tensors if _is_real(tensor)}
    args, kwargs = call.map(lambda tensor: tensor.to(torch.float64, copy=True))
    return _joined(functional_call(block, wide, args, kwargs))


def _joined(outputs: Any) -> Tensor:
    """A block's output tensor, or all tensors of a nested output in one flat tensor."""
    if isinstance(outputs, Tensor):
        return outputs
    tensors = [t.flatten() for t in flatten_outputs(outputs).values() if _is_real(t)]
    if not tensors:
        raise ValueError(
            f'it returns {type(outputs).__name__}, which contains no floating-point tensor'
        )
    return torch.cat(tensors)


def _added(inputs: _Inputs, varying: Tensor, by_channel: bool) -> Tensor | None:
    """What a block adds to its input; ``None`` if it cannot have an identity branch.

    Beside the identity, errors of a small branch would not show. Also ``None`` if each
    channel is compared by itself: such a block folds the identity into the kernel.
    """
    tensors = [a for a in inputs.seeded.args if _is_real(a)]
    if by_channel or len(tensors) != 1 or tensors[0].shape != varying.shape:
        return None
    return varying - tensors[0]


def _size_of(tensor: Tensor) -> Tensor:
    """The root mean square of a tensor."""
    return tensor.square().mean().sqrt()


def _error(
    reference: Tensor,
    output: Tensor,
    least: Tensor,
    by_channel: bool = False,
    added: Tensor | None = None,
) -> float:
    """``|y - y_ref| / |y_ref|``, of the worst channel (dimension 1) or of all together.

    Args:
        reference, output: The tensors ``y_ref`` and ``y``.
        least: Lower limit of the divisor ``|y_ref|``, as a root mean square.
        by_channel: Whether to take the worst channel rather than all together.
        added: Its root mean square, but at least ``_IDENTITY``, is the divisor where that
            is smaller than ``|y_ref|``.
    """
    if reference.shape != output.shape:
        raise ValueError(cannot_compare(reference, output))

    def sizes(tensor: Tensor) -> Tensor:
        rows = tensor.transpose(0, 1).flatten(1) if by_channel else tensor.reshape(1, -1)
        return rows.square().mean(1).sqrt()

    size = sizes(reference)
    if added is not None:
        size = torch.minimum(size, sizes(added).clamp(min=_IDENTITY))
    size = size.clamp(min=least)
    error = sizes(output - reference)
    error = torch.where(error == 0, 0.0, error / size).max().item()
    return inf if isnan(error) else error
