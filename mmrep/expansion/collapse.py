"""Give a network its plain convs and norms back, with the function of its blocks."""

import torch
from torch import nn

from mmrep.reparam import NotFoldableError

from .place import main_norm, places, set_submodule


@torch.no_grad()
def collapse(model: nn.Module) -> list[str]:
    """Put the convs and norms back that :func:`expand` replaced; in place.

    A conv has the equivalent kernel ``W`` of its block, and its norm adds the bias ``b``:
    weight 1, bias ``b``, mean 0, variance ``1 - eps``. In eval mode the model is the same
    function, of its own classes and keys; a plain model loads its weights strictly.

    Args:
        model: An expanded model.

    Returns:
        The names of the convs.

    Raises:
        NotFoldableError: If a block cannot be one conv; names it. The model is unchanged.
        ValueError: If nothing in the model was expanded, or a block is in deploy form.
    """
    found = list(places(model))
    if not found:
        raise ValueError('the model has no block that expand() put there')
    names = {module: name for name, module in model.named_modules()}
    convs, kernels = [], []
    for owner, _, hook in found:
        block = owner.get_submodule(hook.conv)
        convs.append(names[block])
        if block.deploy:
            raise ValueError(f'{names[block]} is in deploy form: collapse what was trained')
        try:
            kernels.append(block.equivalent_kernel_bias(dtype=torch.float64))
        except NotFoldableError as error:
            raise NotFoldableError(f'{names[block]}.{error}') from None
    for (owner, key, hook), (weight, bias) in zip(found, kernels, strict=True):
        block = owner.get_submodule(hook.conv)
        conv = block.get_submodule(block.branch_names[0]).conv
        conv.weight.copy_(weight)
        if hook.norm is None:
            conv.bias.copy_(bias)
        else:
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
            set_submodule(owner, hook.norm, norm)
        set_submodule(owner, hook.conv, conv)
        del owner._load_state_dict_pre_hooks[key]
    return convs
