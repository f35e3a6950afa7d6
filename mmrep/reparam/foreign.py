"""Look into the blocks of other packages, which do not say what they fuse."""

import copy

import torch
from torch import Tensor, nn


@torch.no_grad()
def fused_parts(block: nn.Module) -> list[str]:
    """The modules inside a block of another package that it fuses, each by itself.

    One ``switch_to_deploy`` may stand for a whole network, whose output shows little of
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
        trial.switch_to_deploy()
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
    return sorted(part for part in parts if not any(_contains(p, part) for p in parts))


def _contains(outer: str, name: str) -> bool:
    return outer != name and (not outer or name.startswith(f'{outer}.'))


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
