"""Replace the blocks of an expanded network by plain convs and norms again."""

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
    """Replace blocks that stand for convs by plain convs and norms, in place.

    Such blocks come from :func:`expand` or from a ``conv_cfg``. Each conv gets the
    equivalent kernel ``W`` of its block. The norm that was in the block gets the bias
    ``b``: weight 1, bias ``b``, mean 0, variance ``1 - eps`` (without affine parameters,
    mean ``-b``). If no norm was in the block, the bias goes to the conv or, if the conv has
    none, to the norm after it. In eval mode the model computes the same as before; it has
    the classes and the state-dict keys of the plain model, which loads its weights
    strictly.

    Args:
        model: A model with such blocks.
        example: An input, or a function that runs the model, to find the norm that reads a
            block's output. Default: None, enough if each block has a norm or a bias.

    Returns:
        For the name of each conv, the name of the norm that has its bias; ``None`` if the
        conv itself has it.

    Raises:
        NotFoldableError: If a block cannot be one conv; names it. The model is unchanged.
        ValueError: If the model has no such block, if one is in deploy form, or if neither
            a conv nor a norm can take the bias of one.
    """
    found = list(places(model))
    if not found:
        raise ValueError(
            'the model has no block that stands for a conv: give an expanded model'
        )
    names = names_of(model)
    kernels = {}
    for owner, _, hook in found:
        block = owner.get_submodule(hook.conv)
        name, *_ = names[block]
        if block.deploy:
            raise ValueError(f'{name} is in deploy form: collapse the train form')
        if not name:
            raise ValueError('the model is one block: collapse the model around it')
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
    """Let a norm add a bias to its input, in place."""
    if norm.bias is None:
        norm.running_mean.sub_(bias)
    else:
        # In float64: in float32, little but rounding is left where bias and mean cancel.
        shift = copy.deepcopy(norm).double().eval()(bias[None, :, None, None]).flatten()
        norm.running_mean.zero_()
        norm.bias.copy_(shift)


def norms_after(
    model: nn.Module, example: Tensor | Callable[[nn.Module], Any] | None = None
) -> dict[str, str]:
    """The norm that has to take the bias of a block, by the block's name.

    This concerns blocks that stand for a conv with neither a bias nor a norm of its own.
    The norm is the one that reads the output of the block, and nothing else.

    Args:
        model: A model with blocks that stand for convs.
        example: An input, or a function that runs the model. Default: None, enough if there
            is no such block.

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
            f'{needed[0]} has no bias: give an example, an input of the model, to find '
            'the norm after it that takes the bias of its block'
        )
    pairs = conv_norm_pairs(model, run_of(example), ReparamBlock)
    for name in needed:
        if name not in pairs.norms:
            raise ValueError(
                f'{name} has no bias, and no norm after it that could take the bias of '
                f'its block: {pairs.unpaired[name]}'
            )
    return {name: pairs.norms[name] for name in needed}
