"""Verify every block of a model by itself: its fused conv against its branches.

The outputs of a model say little of a block where a head hides the backbone, or where a
deep network amplifies rounding. A block by itself is an affine function of its input, or
nearly so, and is compared on inputs that show all of it.
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

#: Pixels of a seeded input, at least, and how many a kernel leaves free in it.
_PIXELS, _FREE = 8, 4

#: Errors of a channel count relative to its own response, or to this part of the mean
#: one: a response that is zero on paper is rounding noise in the computer.
_FLOOR = 1e-6

#: What float64 cannot tell from the bias that was subtracted.
_LOST = 1e-10

#: What a block adds to its input, which is of unit scale, counts down to this size: the
#: rounding of an identity that is folded into a float32 kernel is 1e-5 of that.
_IDENTITY = 6e-3

#: Of noise for a block of another package, which may cut off all that is smaller.
_SCALES = (1, 10, 100)


@dataclass(frozen=True)
class BlockDifference:
    """How far a fused block is from its branches, as relative L2 errors.

    Of a re-parameterizable block, what is compared is the part that was fused, without
    the SE layer and the activation that both forms have.

    Args:
        kernel: Of the response to a seeded input of unit scale, less the response to
            zeros, in float64; of the worst channel.
        bias: Of the response to zeros, in float64; of the worst channel.
        seen: Of the output on the input that the block got from the model, in the model's
            dtype, against the branches in float64. ``None`` if it got none.
        branches_seen: The same of the branches in the model's dtype.
        note: What the comparison does not show, of a block of another package.
    """

    kernel: float
    bias: float
    seen: float | None = None
    branches_seen: float | None = None
    note: str = ''

    @property
    def worst(self) -> float:
        """The largest error of fusing alone, without the rounding of a forward pass."""
        return max(self.kernel, self.bias)

    def is_within(self, rtol: float, dtype: torch.dtype = torch.float32) -> bool:
        """Whether the fused block is as close to its branches as fusing can bring it.

        In float64, the responses must be within a tenth of ``rtol``, though not nearer
        than rounding the kernel to its dtype allows. In the model's dtype, where a sum of
        branches can lose more than ``rtol`` itself, the fused block must not lose more
        than they do.
        """
        eps = 8 * torch.finfo(dtype).eps
        return self.worst <= max(rtol / 10, eps) and (self.seen or 0.0) <= max(
            rtol, eps, 2 * (self.branches_seen or 0.0)
        )


class _Responses(NamedTuple):
    """What one block computes; in the model's dtype only of what it saw."""

    seeded: Tensor
    zeros: Tensor
    seen: Tensor | None


def map_tensors(values: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nested values with ``change(x)`` for every tensor of real numbers."""
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
    """The arguments of a module."""

    args: tuple
    kwargs: Mapping[str, Any]

    @property
    def size(self) -> Size:
        """Rows and columns of the first argument, which is the map."""
        first, *_ = (*self.args, *self.kwargs.values())
        return first.shape[2:]

    def map(self, change: Callable[[Tensor], Tensor]) -> 'Call':
        """A call with other tensors in the place of the real ones."""
        return map_tensors(self, change)


class _Inputs(NamedTuple):
    """What a block is called with; in the model's dtype only what it saw."""

    seeded: Call
    zeros: Call
    seen: Call | None


class BlockReference(NamedTuple):
    """What a block was given in train form, and what it made of it."""

    inputs: _Inputs
    responses: _Responses
    exact: Tensor | None
    by_channel: bool
    note: str


class _PlainUnit(nn.Sequential):
    """A conv and its norm, or what they are fused to, or come from."""


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
    """What fusing replaces in a model, by name; each as a module that computes it.

    The blocks, as :func:`~mmrep.reparam.reparam_blocks` finds them, without those inside
    another; the convs with a norm that ``plain_units`` of a module lists; and what is in
    ``norms``, a block or a conv by name, with the norm after it, if it has one.
    """
    blocks: dict[str, nn.Module] = {}
    for name, block in reparam_blocks(model).items():
        # Outer ones come first.
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
    """What each block is first called with while the context is open.

    By the names of :func:`verifiable_blocks`, in the order of the calls. Among them are
    the parts of a block of another package that it fuses one by one
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
    """One of the blocks of a model, or a part of one."""
    return blocks[name] if name in blocks else model.get_submodule(name)


@torch.no_grad()
def block_references(
    model: nn.Module,
    seen: Mapping[str, Call],
    seed: int = 0,
    norms: Mapping[str, str | None] = {},
) -> dict[str, BlockReference]:
    """What every block of a model in train form computes, to be compared when it is fused.

    The blocks must compute branch by branch
    (:func:`~mmrep.reparam.branch_by_branch`), in eval mode.

    Args:
        model: The model.
        seen: What :func:`seen_inputs` saw.
        seed: Of the seeded inputs. Default: 0.
        norms: By the name of a block, that of the norm after it that is compared together
            with it, because it gets the block's bias. Default: none.

    Raises:
        ValueError: If a block of another package got no input, so that nothing is known
            of what it takes, if one cannot compute in float64, or if an output is not
            finite; names the block.
    """
    references = {}
    blocks = verifiable_blocks(model, norms)
    # As they were called, so that the first of many wrong ones is named.
    for name in dict.fromkeys([*seen, *blocks]):
        with _naming(name):
            block = _find(model, blocks, name)
            references[name] = _reference(block, seen.get(name), seed)
    return references


def _reference(block: nn.Module, seen: Call | None, seed: int) -> BlockReference:
    geometry = _geometry(block)
    if seen is None and (geometry is None or geometry.moves_with_size):
        raise ValueError('the input does not reach it, and it needs one')
    # Before the responses, which end in the block's own dtype: pruning and old-style norms
    # of weights leave a layer with the weight of the last call.
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
    """What shows all of a block of another package, as far as it takes it.

    Maps on which each tap of its kernels meets pixels, and numbers so large that what is
    cut off at zero comes through.

    Returns:
        Its inputs, its outputs, and what they do not show.
    """

    def observed(call: Call, scale: float) -> tuple[_Inputs, _Responses]:
        inputs = _inputs(block, call, seen, seed, scale)
        return inputs, _respond(block, inputs, by_channel=False)

    call, note = _widened(block, seen), ''
    for scale in _SCALES:
        try:
            inputs, responses = observed(call, scale)
        except Exception:
            # It may take one size alone, and raise anything for another.
            inputs, responses = observed(seen, scale)
            note = 'its maps are smaller than its kernel, of which some is not seen'
        varying = responses.seeded - responses.zeros
        added = _added(inputs, varying, by_channel=False)
        if _size_of(varying if added is None else added) > _LOST:
            return inputs, responses, note
    return inputs, responses, 'its output does not depend on its input, and shows nothing'


def _widened(block: nn.Module, seen: Call) -> Call:
    """A call with maps on which every tap of a block's kernels meets pixels."""
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
        # So often as large, which divides as the size does.
        return x.repeat(1, 1, *(max(1, -(-least // size)) for size in x.shape[2:]))

    return seen.map(widen)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Name the block in what goes wrong with it, which may be anything."""
    try:
        yield
    except Exception as error:
        kind = '' if isinstance(error, ValueError) else f'{type(error).__name__}: '
        line = str(error).partition('\n')[0]
        raise ValueError(f'{name or "the block"}: {kind}{line}') from error


@torch.no_grad()
def compare_block(reference: BlockReference, block: nn.Module) -> BlockDifference:
    """Compare a fused block with what it was.

    Args:
        reference: What it computed in train form.
        block: What :func:`verifiable_blocks` has of the same name in deploy form.

    Raises:
        ValueError: If an output has another shape.
    """
    inputs, expected, exact, by_channel, note = reference
    actual = _respond(block, inputs, by_channel)
    varying = expected.seeded - expected.zeros
    # What float64 leaves of a kernel beside a bias.
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
    """:func:`compare_block` of every block of a model in deploy form, by name.

    Args:
        references: What the blocks were.
        model: The model.
        norms: Where a conv stands in the place of a block, by its name, that of the norm
            that goes with it; ``None`` for none. Default: no such.

    Raises:
        ValueError: If a block is not there, or an output has another shape.
    """
    blocks = verifiable_blocks(model, norms)
    there = {name for name, _ in model.named_modules()}
    if missing := references.keys() - there:
        raise ValueError(f'the deploy form has no {min(missing)}')
    differences = {}
    for name, reference in references.items():
        with _naming(name):
            differences[name] = compare_block(reference, _find(model, blocks, name))
    return differences


def _geometry(block: nn.Module) -> ConvGeometry | None:
    """The conv that a block becomes; ``None`` for one of another package."""
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
    """Noise and zeros of the shapes of a call."""
    generator = torch.Generator().manual_seed(seed)
    device = next((tensor.device for tensor in _tensors(block).values()), None)

    def draw(tensor: Tensor) -> Tensor:
        # Drawn on the CPU, which gives the same numbers for a seed everywhere.
        return scale * torch.randn(tensor.shape, generator=generator).to(device)

    seeded = like.map(draw)
    return _Inputs(seeded, seeded.map(torch.zeros_like), seen)


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _size(geometry: ConvGeometry, seen: Call | None) -> list[int]:
    """Rows and columns in which every tap of a kernel meets pixels of the input."""
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
        # Mirrored are fewer pixels than there are.
        size = max(_PIXELS, apart * (taps - 1) + 1 + max(_FREE, stride), padding + 1)
        if geometry.moves_with_size:
            # The kernel is fused for the padding of such sizes alone.
            size += (seen.size[axis] - size) % stride
        sizes.append(size)
    return sizes


def _respond(block: nn.Module, inputs: _Inputs, by_channel: bool) -> _Responses:
    if by_channel:
        # One image beside the other: most of the time goes into the weights.
        images = torch.cat([inputs.seeded.args[0], inputs.zeros.args[0]])
        seeded, zeros = _in_float64(block, Call((images,), {})).split(1)
    else:
        seeded, zeros = (_in_float64(block, c) for c in (inputs.seeded, inputs.zeros))
    if inputs.seen is None:
        return _Responses(seeded, zeros, None)
    # Copies, for a block may write into what it is given.
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
    """The one tensor of a block's outputs, or all of them in a row."""
    if isinstance(outputs, Tensor):
        return outputs
    tensors = [t.flatten() for t in flatten_outputs(outputs).values() if _is_real(t)]
    if not tensors:
        raise ValueError(f'a block returns {type(outputs).__name__}, which is no tensor')
    return torch.cat(tensors)


def _added(inputs: _Inputs, varying: Tensor, by_channel: bool) -> Tensor | None:
    """What a block adds to its input, if it may be one that adds to it.

    The identity hides a small branch. Of a block of ours, the identity is in the kernel.
    """
    tensors = [a for a in inputs.seeded.args if _is_real(a)]
    if by_channel or len(tensors) != 1 or tensors[0].shape != varying.shape:
        return None
    return varying - tensors[0]


def _size_of(tensor: Tensor) -> Tensor:
    """The root of the mean square."""
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
        reference, output: The two.
        least: The least that ``|y_ref|``, as root of the mean square, counts for.
        by_channel: Whether each channel counts by itself.
        added: What takes the place of ``y_ref`` if it is smaller, down to a part of it at
            which an identity in a kernel would be rounding noise.
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
