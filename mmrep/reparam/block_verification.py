"""Verify every block of a model by itself: its fused conv against its branches.

The outputs of a model say little of a block where a head hides the backbone, or where a
deep network amplifies rounding. A block by itself is an affine function of its input, or
nearly so, and is compared on inputs that show all of it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf, isnan
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .deploy import reparam_blocks
from .equivalence import flatten_outputs
from .geometry import ConvGeometry, NotFoldableError, conv_geometry

#: Pixels of a seeded input, at least, and how many a kernel leaves free in it.
_PIXELS, _FREE = 8, 4

#: Errors of a channel count relative to its own response, or to this part of the mean
#: one: a response that is zero on paper is rounding noise in the computer.
_FLOOR = 1e-6


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
    """

    kernel: float
    bias: float
    seen: float | None = None
    branches_seen: float | None = None

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


class Call(NamedTuple):
    """The arguments of a module."""

    args: tuple
    kwargs: Mapping[str, Any]

    def map(self, change: Callable[[Tensor], Tensor]) -> 'Call':
        """A call with other tensors in the place of the real ones."""

        def changed(value: Any) -> Any:
            return change(value) if _is_real(value) else value

        kwargs = {name: changed(value) for name, value in self.kwargs.items()}
        return Call(tuple(map(changed, self.args)), kwargs)


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


class _Linear(nn.Module):
    """The part of a block that is fused, as a module."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block.linear(x)


def verifiable_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """What fusing replaces in a model, by name; each as a module that computes it.

    The blocks, as :func:`~mmrep.reparam.reparam_blocks` finds them, without those inside
    another; and the convs with a norm that ``plain_units`` of a module lists.
    """
    blocks: dict[str, nn.Module] = {}
    for name, block in reparam_blocks(model).items():
        # Outer ones come first.
        if not any(name.startswith(f'{outer}.') for outer in blocks):
            blocks[name] = _Linear(block) if hasattr(block, 'check_foldable') else block
    for owner, module in model.named_modules():
        if callable(getattr(module, 'plain_units', None)):
            for name, layers in module.plain_units().items():
                blocks[f'{owner}.{name}'.removeprefix('.')] = nn.Sequential(*layers)
    return blocks


@contextmanager
def seen_inputs(model: nn.Module) -> Iterator[dict[str, Call]]:
    """What each block is first called with while the context is open.

    By the names of :func:`verifiable_blocks`, in the order of the calls.
    """
    seen: dict[str, Call] = {}

    def see(name: str, args: tuple, kwargs: dict) -> None:
        seen.setdefault(name, Call(args, kwargs))

    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, kwargs, name=name: see(name, args, kwargs), with_kwargs=True
        )
        for name in verifiable_blocks(model)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def block_references(
    model: nn.Module, seen: Mapping[str, Call], seed: int = 0
) -> dict[str, BlockReference]:
    """What every block of a model in train form computes, to be compared when it is fused.

    The blocks must compute branch by branch
    (:func:`~mmrep.reparam.branch_by_branch`), in eval mode.

    Args:
        model: The model.
        seen: What :func:`seen_inputs` saw.
        seed: Of the seeded inputs. Default: 0.

    Raises:
        ValueError: If a block of another package got no input, so that nothing is known
            of what it takes, or if an output is not finite; names the block.
    """
    references = {}
    blocks = verifiable_blocks(model)
    # As they were called, so that the first of many wrong ones is named.
    for name in dict.fromkeys([*seen, *blocks]):
        block = blocks[name]
        frame = _frame(block)
        inputs = _inputs(block, frame, seen.get(name), seed, name)
        by_channel = frame is not None
        responses = _respond(block, inputs, by_channel)
        if not all(r.isfinite().all() for r in responses if r is not None):
            raise ValueError(f'the output of {name} is not finite')
        exact = None if inputs.seen is None else _in_float64(block, inputs.seen)
        references[name] = BlockReference(inputs, responses, exact, by_channel)
    return references


@torch.no_grad()
def compare_block(reference: BlockReference, block: nn.Module) -> BlockDifference:
    """Compare a fused block with what it was.

    Args:
        reference: What it computed in train form.
        block: What :func:`verifiable_blocks` has of the same name in deploy form.

    Raises:
        ValueError: If an output has another shape.
    """
    inputs, expected, exact, by_channel = reference
    actual = _respond(block, inputs, by_channel)
    varying = expected.seeded - expected.zeros
    kernel = _error(varying, actual.seeded - actual.zeros, varying, by_channel)
    bias = _error(expected.zeros, actual.zeros, varying, by_channel)
    if exact is None:
        return BlockDifference(kernel, bias)
    seen = (_error(exact, output, varying) for output in (actual.seen, expected.seen))
    return BlockDifference(kernel, bias, *seen)


def compare_blocks(
    references: Mapping[str, BlockReference], model: nn.Module
) -> dict[str, BlockDifference]:
    """:func:`compare_block` of every block of a model in deploy form, by name.

    Raises:
        ValueError: If a block is not there, or an output has another shape.
    """
    blocks = verifiable_blocks(model)
    if missing := set(references).difference(blocks):
        raise ValueError(f'the deploy form has no {min(missing)}')
    return {name: compare_block(r, blocks[name]) for name, r in references.items()}


def _frame(block: nn.Module) -> ConvGeometry | None:
    """The conv that a block becomes; ``None`` for one of another package."""
    if isinstance(block, _Linear):
        return block.block.frame
    try:
        return conv_geometry(block[0]) if isinstance(block, nn.Sequential) else None
    except NotFoldableError:
        return None


def _inputs(
    block: nn.Module,
    frame: ConvGeometry | None,
    seen: Call | None,
    seed: int,
    name: str,
) -> _Inputs:
    generator = torch.Generator().manual_seed(seed)
    device = next((tensor.device for tensor in _tensors(block).values()), None)

    def draw(shape: Sequence[int]) -> Tensor:
        # Drawn on the CPU, which gives the same numbers for a seed everywhere.
        return torch.randn(shape, generator=generator).to(device)

    if seen is None and (frame is None or frame.moves_with_size):
        raise ValueError(f'the input does not reach {name}, which needs one')
    if frame is None:
        seeded = seen.map(lambda tensor: draw(tensor.shape))
    else:
        seeded = Call((draw((1, frame.in_channels, *_size(frame, seen))),), {})
    return _Inputs(seeded, seeded.map(torch.zeros_like), seen)


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _size(frame: ConvGeometry, seen: Call | None) -> list[int]:
    """Rows and columns that every tap of a kernel meets."""
    sizes = []
    for axis, (taps, apart, stride) in enumerate(
        zip(frame.kernel_size, frame.dilation, frame.stride, strict=True)
    ):
        size = max(_PIXELS, apart * (taps - 1) + 1 + _FREE)
        if frame.moves_with_size:
            # The kernel is fused for the padding of such sizes alone.
            size += (seen.args[0].shape[2 + axis] - size) % stride
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


def _error(
    reference: Tensor, output: Tensor, scale: Tensor, by_channel: bool = False
) -> float:
    """``|y - y_ref| / |y_ref|``, of the worst channel (dimension 1) or of all together.

    Where ``|y_ref|`` is next to nothing beside ``scale``, a part of that takes its place.
    """
    if reference.shape != output.shape:
        raise ValueError(
            f'outputs of shape {tuple(reference.shape)} and {tuple(output.shape)} cannot '
            'be compared'
        )

    def sizes(tensor: Tensor) -> Tensor:
        rows = tensor.transpose(0, 1).flatten(1) if by_channel else tensor.reshape(1, -1)
        return rows.square().mean(1).sqrt()

    size = sizes(reference).clamp(min=_FLOOR * scale.square().mean().sqrt())
    error = sizes(output - reference)
    error = torch.where(error == 0, 0.0, error / size).max().item()
    return inf if isnan(error) else error
