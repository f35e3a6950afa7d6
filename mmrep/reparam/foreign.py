"""The blocks of other packages, which turn themselves into what they equal.

They do so by a method of their own, and do not say what they fuse.
"""

import copy
import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

#: Such methods: of the official RepVGG, mmpretrain and mmyolo; of MobileOne and timm; of
#: LeViT, timm and whole networks of Ultralytics; of Ultralytics' ``RepConv``.
_METHODS = ('switch_to_deploy', 'reparameterize', 'fuse', 'fuse_convs')


def switch_method(module: nn.Module) -> str | None:
    """The name of the method by which a module turns itself into its deploy form.

    ``switch_to_deploy``, or ``reparameterize``, ``fuse`` or ``fuse_convs`` where these
    take no arguments.
    """
    return next((name for name in _METHODS if _offers(module, name)), None)


def _offers(module: nn.Module, name: str) -> bool:
    method = getattr(module, name, None)
    # A layer of that name is none.
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
    """Whether a block is in deploy form, as MobileOne and timm say it.

    The method of some raises when it is called again.
    """
    return isinstance(getattr(block, 'reparam_conv', None), nn.Module)


def switched(block: nn.Module) -> nn.Module:
    """Let a block turn itself into its deploy form; returns what is to be in its place.

    What it makes has the mode, device, dtype and ``requires_grad`` of what it was.
    """
    before, parameters = set(block.modules()), list(block.parameters())
    trainable = any(parameter.requires_grad for parameter in parameters)
    name = switch_method(block)
    result = getattr(block, name)()
    if name == 'fuse_convs' and hasattr(block, 'forward_fuse'):
        # Ultralytics' networks do it when they are fused.
        block.forward = block.forward_fuse
    result = result if isinstance(result, nn.Module) else block
    for module in result.modules():
        if module not in before and parameters:
            module.train(block.training)
            module.to(parameters[0])
            module.requires_grad_(trainable)
    return result


def is_inside(outer: str, name: str) -> bool:
    """Whether a module is in another, by their names; ``''`` is the model's."""
    return outer != name and (not outer or name.startswith(f'{outer}.'))


@torch.no_grad()
def fused_parts(block: nn.Module) -> list[str]:
    """The modules inside a block of another package that it fuses, each by itself.

    One method may stand for a whole network, whose output shows little of
    one conv in it. What it does is seen on a copy: a part is the smallest module that is
    there in both forms, and contains the tensors and layers that were replaced and those
    they were replaced by.

    Args:
        block: The block, in train form; it is not changed.

    Returns:
        Names of the parts, relative to the block; none if it cannot be copied, or if its
        switch fails.
    """
    # Old-style norms and pruning leave a layer with a tensor that has a graph.
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
        # That of another package may raise anything, and will again where it is reported.
        return []
    before, after = dict(block.named_modules()), dict(trial.named_modules())
    parts = set()
    for name, module in before.items():
        if name in after and _is_same(module, after[name]):
            continue
        # A layer alone cannot be fused with anything, nor norms alone: they are part of
        # what holds them.
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
    """Whether two modules are the same but for what is in their layers."""
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
