"""Replace the convs of any built network by blocks."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from mmrep.models.blocks import ReparamBlock
from mmrep.models.blocks.base import pair
from mmrep.registry import MODELS
from mmrep.reparam import (
    ConvNormPairs,
    branch_by_branch,
    compare_named,
    conv_geometry,
    conv_norm_pairs,
    eval_pass,
    flatten_outputs,
    names_of,
    set_submodule,
)

from .place import MovedNorm, add_plain_keys

#: The largest relative L2 error of an output: the convs of the plain network compute
#: exactly as before.
_RTOL = 1e-6


@dataclass(frozen=True)
class Expansion:
    """What :func:`expand` did, or would do.

    Args:
        replaced: The norm that went into each block, by the name of the conv that the
            block stands for; ``None`` where there was none.
        left: Why a conv was left as it is, by its name.
    """

    replaced: Mapping[str, str | None]
    left: Mapping[str, str]


def expand(
    model: nn.Module,
    block_cfg: Mapping[str, Any],
    example: Tensor | Callable[[nn.Module], Any],
    kernel_sizes: Sequence[int | tuple[int, int]] = (3, 5),
    include: str | Sequence[str] = '*',
    exclude: str | Sequence[str] = (),
    dry_run: bool = False,
) -> Expansion:
    """Replace convs and their norms by blocks, in place; the model computes the same.

    The conv and the norm become the block's main branch, with their own tensors and
    settings. The other branches start with a contribution of zero. A forward pass finds the
    norm after each conv (:func:`~mmrep.reparam.conv_norm_pairs`). State dicts of the plain
    network load as before, into the main branches.

    Args:
        model: Any model; changed in place.
        block_cfg: Config of the block, as ``dict(type='mmrep.DiverseBranchBlock')``.
        example: An input, or a function that runs the model.
        kernel_sizes: Sizes of the kernels that are replaced. Default: 3 and 5.
        include: Names of the convs that are replaced: patterns as ``'layer?.*'``, or
            regular expressions after ``'re:'``. Default: all.
        exclude: Names of the convs that are not replaced. Default: none.
        dry_run: Whether to report only, and change nothing. Default: False.

    Returns:
        What was replaced, and why the other convs were not.

    Raises:
        ValueError: If no conv can be replaced, if a pattern matches no conv, or if the
            expanded model computes something else; then the model is left as it was.
        TypeError: If ``block_cfg`` is not of a block, or the block does not take its
            arguments.
    """
    run = run_of(example)
    options = dict(block_cfg)
    kind = _block_type(options.pop('type', None))
    sizes = {pair(size) for size in kernel_sizes}
    pairs = conv_norm_pairs(model, run)
    seen = {*pairs.norms, *pairs.unpaired}
    names = [name for name, _ in model.named_modules() if name in seen]
    included, excluded = _matches(include, names), _matches(exclude, names)
    known = _Known(model, pairs)
    blocks, left = {}, {}
    for name in names:
        conv = known.modules[name]
        if name in excluded or name not in included:
            left[name] = 'excluded'
        elif conv.kernel_size not in sizes:
            left[name] = '{}x{}'.format(*conv.kernel_size)
        else:
            norm = known.modules.get(pairs.norms.get(name))
            try:
                known.check(name)
                blocks[name] = block_of(kind, options, conv, norm)
            except ValueError as error:
                left[name] = str(error)
    if not blocks:
        reasons = '; '.join(f'{n} {reason}' for reason, n in Counter(left.values()).items())
        raise ValueError(f'no conv can be replaced: {reasons or "the model has none"}')
    replaced = {name: pairs.norms.get(name) for name in blocks}
    if not dry_run:
        _replace(model, blocks, replaced, run)
    return Expansion(replaced, left)


def run_of(example: Tensor | Callable[[nn.Module], Any]) -> Callable[[nn.Module], Any]:
    """A function that runs a model: the example itself, or a call with it as input."""
    return example if callable(example) else lambda model: model(example)


def _block_type(name: Any) -> type[ReparamBlock]:
    kind = MODELS.get(name) if isinstance(name, str) else name
    if not (isinstance(kind, type) and issubclass(kind, ReparamBlock)):
        raise TypeError(
            f'{name!r} is not a re-parameterizable block: give a block_cfg as '
            "dict(type='mmrep.DiverseBranchBlock')"
        )
    return kind


def _matches(patterns: str | Sequence[str], names: Sequence[str]) -> set[str]:
    """The names that any pattern matches; each pattern has to match at least one."""
    matched = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if pattern.startswith('re:'):
            found = {name for name in names if re.fullmatch(pattern[3:], name)}
        else:
            found = {name for name in names if fnmatchcase(name, pattern)}
        if not found:
            some = ', '.join(names[:3])
            raise ValueError(f'{pattern!r} matches no conv: their names are as {some}')
        matched |= found
    return matched


class _Known:
    """The modules of a model, and the pairs of convs and norms found in it."""

    def __init__(self, model: nn.Module, pairs: ConvNormPairs) -> None:
        self.modules = dict(model.named_modules())
        self.names = names_of(model)
        self.pairs = pairs
        blocks = [m for m in self.names if isinstance(m, ReparamBlock)]
        self.in_blocks = {module for block in blocks for module in block.modules()}

    def check(self, name: str) -> None:
        """Raise a ``ValueError`` if the conv of a name cannot be replaced by any block."""
        conv, pairs = self.modules[name], self.pairs
        norm = pairs.norms.get(name)
        if name in pairs.entangled:
            raise ValueError(pairs.unpaired[name])
        if norm is None and conv.bias is None:
            raise ValueError(
                f'it has neither a bias nor a norm of its own: {pairs.unpaired[name]}'
            )
        for used in (self.modules[n] for n in (name, norm) if n is not None):
            names = self.names[used]
            if len(names) > 1:
                raise ValueError(f'one module with several names: {" and ".join(names)}')
            if used in self.in_blocks:
                raise ValueError('it is in a block already')
        if conv_geometry(conv).moves_with_size:
            raise ValueError("its kernel depends on the input's size, by 'SAME' padding")


def block_of(
    kind: type[ReparamBlock],
    options: Mapping[str, Any],
    conv: nn.Module,
    norm: nn.Module | None = None,
) -> ReparamBlock:
    """Build the block of a conv and its norm, whose settings go to the whole block.

    Raises:
        NotFoldableError: If the conv is of a type whose kernel is not known.
        ValueError: If no such block can stand for the conv.
        TypeError: If the block does not take the options.
    """
    block = kind.from_conv(conv, norm, **options)
    if block.act is not None or block.se_cfg is not None:
        raise TypeError('what follows a conv is kept: leave act_cfg and se_cfg out')
    own = {id(p) for module in (conv, norm) if module for p in module.parameters()}
    for parameter in block.parameters():
        if id(parameter) not in own:
            parameter.requires_grad_(conv.weight.requires_grad)
    if norm is not None:
        for part in block.linear_parts():
            part.train(norm.training)
    return block


def _replace(
    model: nn.Module,
    blocks: Mapping[str, ReparamBlock],
    norms: Mapping[str, str | None],
    run: Callable[[nn.Module], Any],
) -> None:
    """Replace convs and norms of a model by blocks, by name.

    Raises:
        ValueError: If the model then computes something else; it is left as it was.
    """
    with eval_pass(model):
        before = flatten_outputs(run(model))
    with ExitStack() as undo:
        for name, block in blocks.items():
            norm = norms[name]
            undo.callback(set_submodule, model, name, model.get_submodule(name))
            set_submodule(model, name, block)
            if norm is not None:
                undo.callback(set_submodule, model, norm, model.get_submodule(norm))
                set_submodule(model, norm, MovedNorm(block))
            undo.callback(add_plain_keys(model, name, norm).remove)
        with eval_pass(model), branch_by_branch(model):
            after = flatten_outputs(run(model))
        for name, difference in compare_named(before, after).items():
            if not difference.rel_l2 <= _RTOL:
                raise ValueError(
                    f'{name} of the expanded model differs by {difference.rel_l2:.3g} '
                    '(relative L2) from that of the plain one: the model is left as it '
                    'was; exclude the convs that the model does not use as plain convs'
                )
        undo.pop_all()
