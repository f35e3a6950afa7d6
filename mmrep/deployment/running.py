"""Run a model on a seeded input for its raw outputs, to verify its checkpoint."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mmrep.errors import UserError, reason
from mmrep.expansion import collapse
from mmrep.hosts import forward
from mmrep.reparam import DeployReport, Difference, NotFoldableError, switch_to_deploy


class VerificationError(UserError):
    """A verification failed: a model does not compute what it should."""


def seeded_input(shape: tuple[int, ...], seed: int) -> Tensor:
    """A random input that is the same for a seed on every machine."""
    try:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    except RuntimeError as error:
        raise UserError(
            f'an input of shape {shape} does not fit into memory: give a smaller --shape'
        ) from error


@torch.no_grad()
def run_form(model: nn.Module, x: Tensor, form: str) -> Any:
    """:func:`forward` without gradients; any error becomes one that names the form."""
    try:
        return forward(model, x)
    except Exception as error:
        # A model may raise anything for an input that it is not made for.
        raise UserError(
            f'the {form} form cannot process an input of shape {tuple(x.shape)} '
            f'({reason(error)}): give a fitting --shape'
        ) from error


def fuse(model: nn.Module, remedy: str = '') -> DeployReport:
    """Switch a model to deploy form, in place.

    Raises:
        UserError: If a block cannot be fused; the message ends with ``remedy``.
    """
    try:
        return switch_to_deploy(model)
    except NotFoldableError as error:
        raise UserError(f'this model cannot be fused: {error}{remedy}') from None


def to_plain(model: nn.Module, x: Tensor) -> dict[str, str | None]:
    """:func:`~mmrep.expansion.collapse` a model, in place, with ``x`` as its example.

    Raises:
        UserError: If a block cannot be one conv, or the model cannot be collapsed.
    """
    try:
        return collapse(model, partial(run_form, x=x, form='train'))
    except (NotFoldableError, ValueError) as error:
        raise UserError(f'this model cannot be fused: {error}') from None


def check_differences(
    differences: Mapping[str, Difference], rtol: float, reference: str, remedy: str
) -> None:
    """Raise unless every relative L2 error is at most ``rtol``.

    Args:
        differences: How far each output is from its reference.
        rtol: The largest relative L2 error allowed.
        reference: What is compared, for the error: ``'from the train form'``.
        remedy: What the user can do, for the error.

    Raises:
        VerificationError: If one is larger, or not a number.
    """
    for name, difference in differences.items():
        if not difference.rel_l2 <= rtol:
            raise VerificationError(
                f'{name} differs by {difference.rel_l2:.3g} (relative L2) {reference}, '
                f'which is more than {rtol:g}: nothing was written; {remedy}'
            )
