"""Run a model as its checkpoint is verified: on a seeded input, for its raw outputs."""

from collections.abc import Mapping
from typing import Any

import torch
from mmengine.model import BaseModel
from torch import Tensor, nn

from mmrep.errors import UserError, reason
from mmrep.reparam import DeployReport, Difference, NotFoldableError, switch_to_deploy


class VerificationError(UserError):
    """The deploy form is not the function that the train form is."""


def forward(model: nn.Module, x: Tensor) -> Any:
    """The raw outputs of a model: ``mode='tensor'`` of mmengine's ``BaseModel``."""
    return model(x, mode='tensor') if isinstance(model, BaseModel) else model(x)


def seeded_input(shape: tuple[int, ...], seed: int) -> Tensor:
    """The same random input for a seed, on every machine."""
    try:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    except RuntimeError as error:
        raise UserError(
            f'an input of shape {shape} does not fit into memory: give a smaller --shape'
        ) from error


@torch.no_grad()
def run_form(model: nn.Module, x: Tensor, form: str) -> Any:
    """:func:`forward` without gradients; a failure names the form."""
    try:
        return forward(model, x)
    except Exception as error:
        # A model may raise anything for an input that it is not made for.
        raise UserError(
            f'the {form} form cannot process an input of shape {tuple(x.shape)} '
            f'({reason(error)}): give a fitting --shape'
        ) from error


def fuse(model: nn.Module, remedy: str = '') -> DeployReport:
    """Switch a model to deploy form, in place; a model that cannot be is an error.

    Raises:
        UserError: If a block cannot be fused; ends with the ``remedy``.
    """
    try:
        return switch_to_deploy(model)
    except NotFoldableError as error:
        raise UserError(f'this model cannot be fused: {error}{remedy}') from None


def check_differences(
    differences: Mapping[str, Difference], rtol: float, reference: str, remedy: str
) -> None:
    """Raise unless every relative L2 error is at most ``rtol``.

    Args:
        differences: How far each output is from its reference.
        rtol: The largest relative L2 error allowed.
        reference: From what, for the error.
        remedy: What to do then, for the error.

    Raises:
        VerificationError: If one is larger, or not a number.
    """
    for name, difference in differences.items():
        if not difference.rel_l2 <= rtol:
            raise VerificationError(
                f'{name} is {difference.rel_l2:.3g} (relative L2) {reference}, which is '
                f'more than {rtol:g}: nothing was written; {remedy}'
            )
