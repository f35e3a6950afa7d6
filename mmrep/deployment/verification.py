"""Verify that a deploy form computes the same as its train form."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from math import inf
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from mmrep.errors import UserError
from mmrep.expansion import norms_after
from mmrep.reparam import (
    BlockDifference,
    BlockReference,
    Call,
    Difference,
    block_references,
    branch_by_branch,
    compare_blocks,
    compare_named,
    compare_tensors,
    flatten_outputs,
    map_tensors,
    seen_inputs,
)

from .running import VerificationError, check_differences, run_form, seeded_input

T = TypeVar('T')

#: Size of rounding errors in float32, for an input of unit scale.
_NOISE = 32 * torch.finfo(torch.float32).eps

#: A network that multiplies such noise by this factor or more amplifies rounding.
_AMPLIFIED = 10

#: An output whose relative L2 change for another input is less verifies little.
_HARDLY = 1e-2


class TrainForm(NamedTuple):
    """What a train form computes for a seeded input.

    Args:
        x: The input.
        seed: Its seed.
        outputs: The outputs, and the features of the backbone, by name.
        blocks: What each block computes, by name.
    """

    x: Tensor
    seed: int
    outputs: dict[str, Tensor]
    blocks: dict[str, BlockReference]


@dataclass(frozen=True)
class Verification:
    """How far a deploy form is from its train form.

    Args:
        outputs: How far each output, and each feature map of the backbone, is.
        blocks: How far each block is from its branches, by name.
        dependence: The relative L2 change of each output for another input. An output that
            hardly depends on the input verifies little of the network before it.
        sensitivity: For outputs that differ by more than is allowed although every block is
            right: their relative L2 change for noise of the size of rounding.
    """

    outputs: Mapping[str, Difference]
    blocks: Mapping[str, BlockDifference]
    dependence: Mapping[str, float]
    sensitivity: Mapping[str, float]

    @property
    def worst_block(self) -> str | None:
        """The name of the block that is furthest from its branches."""
        return max(self.blocks, key=lambda name: self.blocks[name].worst, default=None)

    def record(self) -> dict:
        """The verification in plain types, for the ``meta`` of a checkpoint."""
        worst = self.worst_block
        return {
            'rel_l2': max(d.rel_l2 for d in self.outputs.values()),
            'max_abs': max(d.max_abs for d in self.outputs.values()),
            'outputs': {name: asdict(d) for name, d in self.outputs.items()},
            'dependence': dict(self.dependence),
            'ill_conditioned': dict(self.sensitivity),
            'worst_block': worst and {'name': worst, **asdict(self.blocks[worst])},
        }

    def remarks(self) -> list[str]:
        """What a user should know of the outputs, a sentence each."""
        return [
            *(
                f'{name} is ill-conditioned: noise of the size of rounding changes it by '
                f'{change:.1g}, so its difference proves nothing; every block is right'
                for name, change in self.sensitivity.items()
            ),
            *(f'{r}; every block is right by itself' for r in remarks_on(self.dependence)),
            *(f'{name}: {d.note}' for name, d in self.blocks.items() if d.note),
        ]


def remarks_on(dependence: Mapping[str, float]) -> list[str]:
    """What a user should know of outputs that hardly depend on the input."""
    return [
        f'{name} hardly depends on the input ({change:.1g}) and verifies little of the '
        'network'
        for name, change in dependence.items()
        if change < _HARDLY
    ]


def check_rtol(rtol: float) -> None:
    """Raise a ``UserError`` unless ``rtol`` is between 0 and 1."""
    if not 0 < rtol < 1:
        raise UserError(
            f'{rtol:g} cannot be the largest relative error allowed: give --rtol a number '
            'between 0 and 1'
        )


def observe(
    model: nn.Module, shape: tuple[int, ...], seed: int, expanded: bool = False
) -> TrainForm:
    """Run a train form branch by branch on a seeded input, and record its outputs.

    Args:
        model: The train form.
        shape: Shape of the input.
        seed: Seed of the input.
        expanded: Whether the model is expanded, so that a norm after a block is compared
            together with the block. Default: False.

    Raises:
        VerificationError: If an output or a block proves nothing, since it is not finite or
            zero everywhere; names it.
        UserError: If the model cannot process the input.
    """
    x = seeded_input(shape, seed)
    norms = {}
    if expanded:
        run = partial(run_form, x=x, form='train')
        norms = _compared('train form', norms_after, model, run)
    with branch_by_branch(model):
        with seen_inputs(model) as seen:
            outputs = _run(model, x, 'train')
        blocks = observe_blocks(model, seen, seed, norms)
    check_outputs(outputs, 'train')
    return TrainForm(x, seed, outputs, blocks)


def check_outputs(outputs: Mapping[str, Tensor], form: str) -> None:
    """Refuse outputs that prove nothing when they are compared.

    Raises:
        VerificationError: If one is complex, not finite or zero everywhere; names it.
    """
    remedy = 'look at the weights of the checkpoint, or try another --shape'
    for name, output in outputs.items():
        if output.is_complex():
            problem, remedy = 'is complex', 'give a model of real outputs'
        elif not output.isfinite().all():
            problem = 'is not finite'
        elif output.is_floating_point() and output.numel() and not output.any():
            problem = 'is zero everywhere, which proves nothing'
        else:
            continue
        raise VerificationError(
            f'{name} of the {form} form {problem}: nothing was written; {remedy}'
        )


def observe_blocks(
    model: nn.Module,
    seen: Mapping[str, Call],
    seed: int = 0,
    norms: Mapping[str, str | None] = {},
) -> dict[str, BlockReference]:
    """:func:`~mmrep.reparam.block_references` of a train form that is to be verified.

    Raises:
        VerificationError: If a block cannot be verified; names it.
    """
    return _compared('train form', block_references, model, seen, seed, norms)


def verify_blocks(
    references: Mapping[str, BlockReference],
    deployed: nn.Module,
    rtol: float,
    norms: Mapping[str, str | None] = {},
) -> dict[str, BlockDifference]:
    """Compare every block of a deploy form with its branches.

    Args:
        references: What the blocks of the train form compute.
        deployed: The deploy form.
        rtol: See :meth:`~mmrep.reparam.BlockDifference.is_within`.
        norms: See :func:`~mmrep.reparam.compare_blocks`. Default: none.

    Raises:
        VerificationError: If a block differs by more; names it.
    """
    blocks = _compared('deploy form', compare_blocks, references, deployed, norms)
    for name, difference in blocks.items():
        if not difference.is_within(rtol):
            raise VerificationError(
                f'{name} differs by {max(difference.worst, difference.seen or 0.0):.3g} '
                '(relative L2) from its branches, which is more than rounding: nothing was '
                'written; report the block, or the config'
            )
    return blocks


def verify(
    train: TrainForm,
    deployed: nn.Module,
    rtol: float,
    norms: Mapping[str, str | None] = {},
) -> Verification:
    """Compare a deploy form with its train form: block by block, then the outputs.

    An output may differ by more than ``rtol`` if every block is right, and noise of the
    size of rounding, added to the input and to the output of each block, changes the output
    by as much: then the network amplifies rounding, and the comparison of blocks decides.

    Args:
        train: What :func:`observe` recorded.
        deployed: The deploy form.
        rtol: The largest relative L2 error of an output; see
            :meth:`~mmrep.reparam.BlockDifference.is_within` for that of a block.
        norms: See :func:`~mmrep.reparam.compare_blocks`. Default: none.

    Raises:
        VerificationError: If a block or an output differs by more, if two runs of the
            deploy form differ, or if its outputs prove nothing: not finite, zero
            everywhere, or independent of the input.
    """
    blocks = verify_blocks(train.blocks, deployed, rtol, norms)
    outputs, again = (_run(deployed, train.x, 'deploy') for _ in range(2))
    differences = _compared('deploy form', compare_named, train.outputs, outputs)
    check_outputs(outputs, 'deploy')
    check_differences(
        _compared('deploy form', compare_named, outputs, again),
        rtol,
        'between two runs of the deploy form on one input',
        'turn off its random operations, as dropout or sampling',
    )
    other = seeded_input(tuple(train.x.shape), train.seed + 1)
    dependence = changes_of(outputs, _run(deployed, other, 'deploy'))
    check_dependence(dependence)
    beyond = {name: d for name, d in differences.items() if not d.rel_l2 <= rtol}
    sensitivity = {}
    if beyond:
        changes = _changes_by_noise(deployed, train, blocks, outputs)
        sensitivity = {
            name: changes[name]
            for name, difference in beyond.items()
            if max(difference.rel_l2, _AMPLIFIED * _NOISE) <= changes.get(name, 0.0)
        }
    check_differences(
        {name: d for name, d in beyond.items() if name not in sensitivity},
        rtol,
        'from the train form',
        'every block is right, so look at the layers outside of them, or report the config',
    )
    return Verification(differences, blocks, dependence, sensitivity)


def _run(model: nn.Module, x: Tensor, form: str) -> dict[str, Tensor]:
    """The outputs of a model and the features of its backbone, by name."""
    features: list = []
    backbone = getattr(model, 'backbone', None)
    hook = None
    if isinstance(backbone, nn.Module):
        hook = backbone.register_forward_hook(lambda *args: features.append(args[-1]))
    try:
        outputs = flatten_outputs(run_form(model, x, form))
    finally:
        if hook is not None:
            hook.remove()
    return outputs | (flatten_outputs(features[0], 'backbone') if features else {})


def check_dependence(dependence: Mapping[str, float]) -> None:
    """Refuse outputs none of which depends on the input.

    Args:
        dependence: How much each changes for another input.

    Raises:
        VerificationError: If none changes.
    """
    if not any(dependence.values()):
        raise VerificationError(
            'no output depends on the input, so comparing them proves nothing: nothing was '
            'written; look at the weights of the checkpoint'
        )


def _compared(form: str, compare: Callable[..., T], *forms: Any) -> T:
    """Call a comparison; if it is impossible, the verification has failed."""
    try:
        return compare(*forms)
    except ValueError as error:
        raise VerificationError(
            f'the {form} cannot be verified: {error}; nothing was written; give another '
            '--shape, or report the config'
        ) from error


@contextmanager
def _noise_in(
    model: nn.Module, blocks: Mapping[str, BlockDifference], seed: int
) -> Iterator[None]:
    """Add noise of the size of rounding to the output of each block.

    Relative to the output, its size is 8 times the epsilon of float32, or twice what the
    branches lost by rounding, if that is more.
    """
    generator = torch.Generator().manual_seed(seed)

    def disturb(name: str, outputs: Any) -> Any:
        lost = blocks[name].branches_seen or 0.0
        factor = max(8 * torch.finfo(torch.float32).eps, 2 * lost)
        return map_tensors(
            outputs,
            lambda y: y + factor * y * torch.randn(y.shape, generator=generator).to(y),
        )

    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda *args, name=name: disturb(name, args[-1])
        )
        for name in blocks
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _changes_by_noise(
    deployed: nn.Module,
    train: TrainForm,
    blocks: Mapping[str, BlockDifference],
    outputs: Mapping[str, Tensor],
) -> dict[str, float]:
    """The change of each output for noise of the size of rounding; the larger of two."""
    changes = []
    for seed in (train.seed + 2, train.seed + 3):
        noise = _NOISE * seeded_input(tuple(train.x.shape), seed)
        with _noise_in(deployed, blocks, seed):
            changes.append(changes_of(outputs, _run(deployed, train.x + noise, 'deploy')))
    return {name: max(change[name] for change in changes) for name in changes[0]}


def changes_of(
    outputs: Mapping[str, Tensor], others: Mapping[str, Tensor]
) -> dict[str, float]:
    """The relative L2 change of each output; infinite if it is gone or of another shape."""
    return {
        name: compare_tensors(output, others[name]).rel_l2
        if name in others and others[name].shape == output.shape
        else inf
        for name, output in outputs.items()
        if output.numel()
    }
