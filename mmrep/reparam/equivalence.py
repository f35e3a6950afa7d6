"""Compare the outputs of two forms of a model."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Difference:
    """How far an output is from its reference.

    Args:
        rel_l2: ``|y - y_ref| / |y_ref|`` in the Euclidean norm.
        max_abs: ``max |y - y_ref|``.
        argmax_agreement: Fraction of positions where the largest channel (dimension 1)
            is the same one.
    """

    rel_l2: float
    max_abs: float
    argmax_agreement: float


def cannot_compare(reference: Tensor, output: Tensor) -> str:
    """The error message for tensors of different shapes."""
    shapes = f'{tuple(reference.shape)} and {tuple(output.shape)}'
    return f'outputs of shape {shapes} cannot be compared'


def compare_tensors(reference: Tensor, output: Tensor) -> Difference:
    """Compare two tensors of one shape ``(N, C, ...)`` as numbers, in float64.

    Both errors are infinite if either tensor contains a NaN or an infinity. The relative
    error is infinite if a floating-point reference is zero everywhere, since equal zeros
    prove nothing; integers and booleans, such as classes and masks, may be zero. Empty
    tensors are equal.

    Raises:
        ValueError: If the shapes differ, or a tensor is complex.
    """
    if reference.shape != output.shape:
        raise ValueError(cannot_compare(reference, output))
    if reference.is_complex() or output.is_complex():
        raise ValueError('complex outputs cannot be compared')
    if not reference.numel():
        return Difference(0.0, 0.0, 1.0)
    undefined = float('inf') if reference.is_floating_point() else 0.0
    reference, output = reference.double(), output.double()
    axis = min(1, reference.dim() - 1)
    agreement = (reference.argmax(axis) == output.argmax(axis)).double().mean().item()
    if not (reference.isfinite().all() and output.isfinite().all()):
        return Difference(float('inf'), float('inf'), agreement)
    error = output - reference
    rel_l2 = (error.norm() / reference.norm()).item()
    return Difference(
        # NaN is 0 / 0.
        undefined if math.isnan(rel_l2) else rel_l2,
        error.abs().max().item(),
        agreement,
    )


def flatten_outputs(outputs: Any, name: str = 'output') -> dict[str, Tensor]:
    """The tensors in nested tuples, lists and dicts, by a name like ``output[0]``."""
    if isinstance(outputs, Tensor):
        return {name: outputs}
    if isinstance(outputs, dict):
        items = outputs.items()
    elif isinstance(outputs, list | tuple):
        items = enumerate(outputs)
    else:
        return {}
    flat = {}
    for key, value in items:
        flat.update(flatten_outputs(value, f'{name}[{key}]'))
    return flat


def compare_outputs(reference: Any, outputs: Any) -> dict[str, Difference]:
    """Compare nested outputs tensor by tensor; see :func:`compare_named`."""
    return compare_named(flatten_outputs(reference), flatten_outputs(outputs))


def compare_named(
    reference: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
) -> dict[str, Difference]:
    """Compare tensors of the same names.

    Raises:
        ValueError: If the names differ, or if there are no tensors but empty ones.
    """
    if reference.keys() != outputs.keys():
        raise ValueError(
            f'outputs cannot be compared: the reference has {sorted(reference)}, the other '
            f'{sorted(outputs)}'
        )
    if not any(tensor.numel() for tensor in reference.values()):
        raise ValueError('outputs cannot be compared: they have no tensors but empty ones')
    return {name: compare_tensors(reference[name], outputs[name]) for name in reference}


@contextmanager
def branch_by_branch(model: nn.Module) -> Iterator[nn.Module]:
    """Make every block compute its branches one by one, as in training.

    A block whose norms use running statistics may compute with its equivalent kernel;
    a reference for fusing must not.
    """
    blocks = [module for module in model.modules() if hasattr(module, 'one_conv')]
    before = [block.one_conv for block in blocks]
    try:
        for block in blocks:
            block.one_conv = False
        yield model
    finally:
        for block, value in zip(blocks, before, strict=True):
            block.one_conv = value
