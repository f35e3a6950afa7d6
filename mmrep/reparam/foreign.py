"""Blocks of other packages, which switch to their deploy form by a method of their own.

Which modules the method fuses is not known beforehand; see :func:`fused_parts`.
"""

import copy
import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

#: Names of such methods. In this order, they are those of the official RepVGG, mmpretrain
#: and mmyolo; of MobileOne and timm; of LeViT, timm and whole networks of Ultralytics; and
#: of Ultralytics' ``RepConv``.
_METHODS = ('switch_to_deploy', 'reparameterize', 'fuse', 'fuse_convs')


def switch_method(module: nn.Module) -> str | None:
    """The name of the method by which a module switches to its deploy form, or ``None``.

    ``switch_to_deploy``, or ``reparameterize``, ``fuse`` or ``fuse_convs`` if that method
    needs no arguments.
    """
    return next((name for name in _METHODS if _offers(module, name)), None)


def _offers(module: nn.Module, name: str) -> bool:
    method = getattr(module, name, None)
    # A submodule of that name is not a method.
    return (
        callable(method)
        and not isinstance(method, nn.Module)
        and (name == 'switch_to_deploy' or _takes_nothing(method))
    )


def _takes_nothing(method: Callable) -> bool:
    return not any(
        parameter.default is parameter.empty
        for parameter in inspect.signature(method).parameters.values()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    )


def has_reparam_conv(block: nn.Module) -> bool:
    """Whether a block has the conv that MobileOne's and timm's blocks have in deploy form.

    Such a block must not be switched again: the method of some raises then.
    """
    return isinstance(getattr(block, 'reparam_conv', None), nn.Module)


def switched(block: nn.Module) -> nn.Module:
    """Switch a block by its own method; return the module to put in its place.

    Modules that the method creates get the block's mode, device, dtype and
    ``requires_grad``.
    """
    before, parameters = set(block.modules()), list(block.parameters())
    trainable = any(parameter.requires_grad for parameter in parameters)
    name = switch_method(block)
    result = getattr(block, name)()
    if name == 'fuse_convs' and hasattr(block, 'forward_fuse'):
        # Ultralytics' networks do this when they fuse the block.
        block.forward = block.forward_fuse
    result = result if isinstance(result, nn.Module) else block
    for module in result.modules():
        if module not in before and parameters:
            module.train(block.training)
            module.to(parameters[0])
            module.requires_grad_(trainable)
    return result


def is_inside(outer: str, name: str) -> bool:
    """Whether a module is inside another, by their names; ``''`` is the whole model."""
    return outer != name and (not outer or name.startswith(f'{outer}.'))


@torch.no_grad()
def fused_parts(block: nn.Module) -> list[str]:
    """The names of the parts that a block of another package fuses independently.

    One method may fuse a whole network, whose output shows little of a single conv. To find
    the parts, a copy is switched and compared with the block: a part is the smallest module
    that is in both forms and contains both what was replaced and what replaced it.

    Args:
        block: The block, in train form; it is not changed.

    Returns:
        Names of the parts, relative to the block; an empty list if the block cannot be
        copied or its method raises.
    """
    # Hook-based weight norms and pruning leave non-leaf tensors, which deepcopy refuses.
    computed = {
        id(value): value.clone()
        for module in block.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor)
    }
    try:
        trial = copy.deepcopy(block, computed)
        trial = switched(trial)
    except Exception:
        # The method may raise any exception; it is reported when the block is switched.
        return []
    before, after = dict(block.named_modules()), dict(trial.named_modules())
    parts = set()
    for name, module in before.items():
        if name in after and _is_same(module, after[name]):
            continue
        # A single layer, or norms without a conv, cannot be fused: go to the module around.
        while name and not (_layers(module) and _has_kernel(module)):
            name = name.rpartition('.')[0]
            module = before[name]
        parts.add(name)
    return sorted(part for part in parts if not any(is_inside(p, part) for p in parts))


def _has_kernel(module: nn.Module) -> bool:
    return any(parameter.dim() > 1 for parameter in module.parameters())


def _layers(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_children()]


def _is_same(module: nn.Module, other: nn.Module) -> bool:
    """Whether two modules agree in type, own tensors and names of their layers."""
    mine, theirs = _tensors(module), _tensors(other)
    return (
        type(module) is type(other)
        and _layers(module) == _layers(other)
        and mine.keys() == theirs.keys()
        and all(
            tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name])
            for name, tensor in mine.items()
        )
    )


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters(recurse=False)) | dict(
        module.named_buffers(recurse=False)
    )
