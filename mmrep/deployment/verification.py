"""Verify that a deploy form is the function that its train form is."""

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

#: Of an input of unit scale, what may be rounding in float32.
_NOISE = 32 * torch.finfo(torch.float32).eps

#: A network that makes so much more of it amplifies rounding.
_AMPLIFIED = 10

#: An output that changes by less, relative to itself, shows little of the network.
_HARDLY = 1e-2


class TrainForm(NamedTuple):
    """What a train form computes on a seeded input.

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
        dependence: How much each output changes for another input, as relative L2; one
            that hardly depends on the input shows little of the network before it.
        sensitivity: Of the outputs that differ by more than was allowed, though every
            block is right: what they change by for noise of the size of rounding.
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
        """What a file says of its verification, in plain types."""
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
                f'{change:.1g}, so that its difference tells nothing; every block is right'
                for name, change in self.sensitivity.items()
            ),
            *(f'{r}; every block is right by itself' for r in remarks_on(self.dependence)),
            *(f'{name}: {d.note}' for name, d in self.blocks.items() if d.note),
        ]


def remarks_on(dependence: Mapping[str, float]) -> list[str]:
    """What a user should know of outputs that hardly depend on the input."""
    return [
        f'{name} hardly depends on the input ({change:.1g}) and shows little of the network'
        for name, change in dependence.items()
        if change < _HARDLY
    ]


def check_rtol(rtol: float) -> None:
    """Raise a ``UserError`` unless ``rtol`` is an error that can be allowed."""
    if not 0 < rtol < 1:
        raise UserError(
            f'{rtol:g} cannot be the largest relative error allowed: give --rtol a number '
            'between 0 and 1'
        )


def observe(
    model: nn.Module, shape: tuple[int, ...], seed: int, expanded: bool = False
) -> TrainForm:
    """Run a train form branch by branch on a seeded input of a shape.

    Args:
        model: The train form.
        shape: Of the input.
        seed: Of the input.
        expanded: Whether blocks stand for convs in it, so that a norm after one is seen
            together with the block. Default: False.

    Raises:
        VerificationError: If something in it is not finite or zero everywhere; names it.
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
    """Refuse outputs of a form that prove nothing.

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
        VerificationError: If a block cannot be; names it.
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
        references: What the blocks were.
        deployed: The deploy form.
        rtol: See :meth:`~mmrep.reparam.BlockDifference.is_within`.
        norms: See :func:`~mmrep.reparam.compare_blocks`. Default: none.

    Raises:
        VerificationError: If one is not :meth:`~mmrep.reparam.BlockDifference.is_within`.
    """
    blocks = _compared('deploy form', compare_blocks, references, deployed, norms)
    for name, difference in blocks.items():
        if not difference.is_within(rtol):
            raise VerificationError(
                f'{name} is {max(difference.worst, difference.seen or 0.0):.3g} '
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

    An output may differ by more than ``rtol`` where every block is right and noise of the
    size of rounding, in the input and in the output of each block, changes it by as much:
    the network amplifies rounding, and the blocks decide.

    Args:
        train: What :func:`observe` saw.
        deployed: The deploy form.
        rtol: The largest relative L2 error of an output; see
            :meth:`~mmrep.reparam.BlockDifference.is_within` for that of a block.
        norms: See :func:`~mmrep.reparam.compare_blocks`. Default: none.

    Raises:
        VerificationError: If something differs by more, if two runs of the deploy form
            differ, or if no output depends on the input.
    """
    blocks = verify_blocks(train.blocks, deployed, rtol, norms)
    outputs, again = (_run(deployed, train.x, 'deploy') for _ in range(2))
    differences = _compared('deploy form', compare_named, train.outputs, outputs)
    check_outputs(outputs, 'deploy')
    check_differences(
        _compared('deploy form', compare_named, outputs, again),
        rtol,
        'apart in two runs of the deploy form on one input',
        'turn off what is random in it, as dropout or sampling',
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
        'every block is right, so look for what stands between them, or report the config',
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
    """Refuse outputs of which none depends on the input.

    Args:
        dependence: How much each changes for another input.

    Raises:
        VerificationError: If none changes.
    """
    if not any(dependence.values()):
        raise VerificationError(
            'no output depends on the input, so that none proves anything: nothing was '
            'written; look at the weights of the checkpoint'
        )


def _compared(form: str, compare: Callable[..., T], *forms: Any) -> T:
    """What a comparison finds; what cannot be compared is not verified."""
    try:
        return compare(*forms)
    except ValueError as error:
        raise VerificationError(
            f'the {form} cannot be verified: {error}; nothing was written'
        ) from error


@contextmanager
def _noise_in(
    model: nn.Module, blocks: Mapping[str, BlockDifference], seed: int
) -> Iterator[None]:
    """What rounding may do: each block's output gets noise of its size.

    That is a few times the precision of float32, or what the branches lost by rounding.
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
    """How much noise of the size of rounding changes each output; the larger of two."""
    changes = []
    for seed in (train.seed + 2, train.seed + 3):
        noise = _NOISE * seeded_input(tuple(train.x.shape), seed)
        with _noise_in(deployed, blocks, seed):
            changes.append(changes_of(outputs, _run(deployed, train.x + noise, 'deploy')))
    return {name: max(change[name] for change in changes) for name in changes[0]}


def changes_of(
    outputs: Mapping[str, Tensor], others: Mapping[str, Tensor]
) -> dict[str, float]:
    """How much each output changes, relative to itself; one of another shape, wholly."""
    return {
        name: compare_tensors(output, others[name]).rel_l2
        if name in others and others[name].shape == output.shape
        else inf
        for name, output in outputs.items()
        if output.numel()
    }
