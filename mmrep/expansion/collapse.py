"""Give a network its plain convs and norms back, with the function of its blocks."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmrep.models.blocks import ReparamBlock
from mmrep.reparam import NotFoldableError, conv_norm_pairs, names_of, set_submodule

from .expand import run_of
from .place import main_norm, places


@torch.no_grad()
def collapse(
    model: nn.Module, example: Tensor | Callable[[nn.Module], Any] | None = None
) -> dict[str, str | None]:
    """Put convs and norms in the place of blocks that stand for convs; in place.

    These are the blocks of :func:`expand`, and those that ``conv_cfg`` put there. A conv
    has the equivalent kernel ``W`` of its block, and the norm that was in the block adds
    the bias ``b``: weight 1, bias ``b``, mean 0, variance ``1 - eps``. Where no norm was in
    the block, the conv's own bias takes it, or the norm after it, which has a mean of 0
    then. In eval mode the model is the same function, of its own classes and keys; a plain
    model loads its weights strictly.

    Args:
        model: A model with such blocks.
        example: An input, or a function that runs the model, to see which norm reads what a
            block made. Default: None, which will do where each block has a norm or a bias.

    Returns:
        By the name of each conv, that of the norm that has its bias; ``None`` where the
        conv itself has it.

    Raises:
        NotFoldableError: If a block cannot be one conv; names it. The model is unchanged.
        ValueError: If the model has no such block, if one is in deploy form, or if the bias
            of one has no place.
    """
    found = list(places(model))
    if not found:
        raise ValueError('the model has no block that stands for a conv')
    names = names_of(model)
    kernels = {}
    for owner, _, hook in found:
        block = owner.get_submodule(hook.conv)
        name, *_ = names[block]
        if block.deploy:
            raise ValueError(f'{name} is in deploy form: collapse what was trained')
        if not name:
            raise ValueError('the model is one block: collapse what it stands in')
        try:
            kernels[name] = block.equivalent_kernel_bias(dtype=torch.float64)
        except NotFoldableError as error:
            raise NotFoldableError(f'{name}.{error}') from None
    after = norms_after(model, example)
    norms = {}
    for owner, key, hook in found:
        block = owner.get_submodule(hook.conv)
        name, conv = names[block][0], block.main_conv
        weight, bias = kernels[name]
        conv.weight.copy_(weight)
        if hook.norm is not None:
            norm = main_norm(block)
            if conv.bias is not None:
                conv.bias.zero_()
            norm.running_var.fill_(1 - norm.eps)
            if norm.bias is None:
                norm.running_mean.copy_(-bias)
            else:
                norm.running_mean.zero_()
                norm.weight.fill_(1)
                norm.bias.copy_(bias)
            norms[name] = '.'.join(filter(None, (names[owner][0], hook.norm)))
            set_submodule(model, norms[name], norm)
        elif name in after:
            norms[name] = after[name]
            _shift(model.get_submodule(after[name]), bias)
        else:
            norms[name] = None
            conv.bias.copy_(bias)
        # A head may use one conv at several levels.
        for each in names[block]:
            set_submodule(model, each, conv)
        del owner._load_state_dict_pre_hooks[key]
    return norms


def _shift(norm: nn.Module, bias: Tensor) -> None:
    """Let a norm add a bias to what it reads."""
    if norm.bias is None:
        norm.running_mean.sub_(bias)
    else:
        # Of small size where bias and mean cancel; their difference would be rounding.
        shift = copy.deepcopy(norm).double().eval()(bias[None, :, None, None]).flatten()
        norm.running_mean.zero_()
        norm.bias.copy_(shift)


def norms_after(
    model: nn.Module, example: Tensor | Callable[[nn.Module], Any] | None = None
) -> dict[str, str]:
    """The norm that has to take the bias of a block, by the block's name.

    That is the norm that reads what the block made, and nothing else, where the block
    stands for a conv with neither a bias nor a norm of its own.

    Args:
        model: A model with blocks that stand for convs.
        example: An input, or a function that runs the model. Default: None, which will do
            where there is no such block.

    Raises:
        ValueError: If such a block has no norm after it.
    """
    names = names_of(model)
    found = [
        (names[block][0], block)
        for owner, _, hook in places(model)
        if hook.norm is None and not (block := owner.get_submodule(hook.conv)).deploy
    ]
    needed = [name for name, block in found if block.bias is None]
    if not needed:
        return {}
    if example is None:
        raise ValueError(
            f'{needed[0]} has no bias: give an example, an input of the model, to see '
            'which norm after it can have that of its block'
        )
    pairs = conv_norm_pairs(model, run_of(example), ReparamBlock)
    for name in needed:
        if name not in pairs.norms:
            raise ValueError(
                f'{name} has no bias, and no norm after it that could have that of its '
                f'block: {pairs.unpaired[name]}'
            )
    return {name: pairs.norms[name] for name in needed}
