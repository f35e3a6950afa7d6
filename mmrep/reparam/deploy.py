"""Walk a model and turn every re-parameterizable block into one conv."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from .fold import fold_branches
from .geometry import NotFoldableError, conv_geometry, linear_conv_type


@dataclass
class DeployReport:
    """What :func:`switch_to_deploy` did.

    Args:
        switched: Names of the blocks that became one conv.
        deployed: Names of the blocks that were one conv already.
        params_before: Number of parameters before.
        params_after: Number of parameters after.
    """

    switched: list[str] = field(default_factory=list)
    deployed: list[str] = field(default_factory=list)
    params_before: int = 0
    params_after: int = 0


def _offers_switch(module: nn.Module) -> bool:
    return callable(getattr(module, 'switch_to_deploy', None))


def reparam_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a model that can be switched, by name.

    A block is an innermost module with a ``switch_to_deploy`` method: a backbone that
    offers one as well only walks over its blocks, and says so by ``walks_over_blocks``
    where it may have none.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if _offers_switch(module)
        and not getattr(module, 'walks_over_blocks', False)
        and not any(_offers_switch(m) for m in module.modules() if m is not module)
    }


def switch_to_deploy(
    model: nn.Module, release: Callable[[Iterable[Tensor]], None] | None = None
) -> DeployReport:
    """Turn every block of a model into the one conv that it equals, in place.

    Idempotent, and all or nothing: every block is checked before the first is changed.
    Train or eval mode, device, dtype and ``requires_grad`` stay as they are.

    Args:
        model: Any module; blocks of other packages that offer ``switch_to_deploy`` are
            switched, too.
        release: Called with the parameters of each block after it was switched: what
            nobody needs any more, unless it is held elsewhere. Default: None.

    Returns:
        What was done.

    Raises:
        NotFoldableError: If a block cannot be one conv; names the block, the branch and
            the reason. The model is unchanged.
    """
    blocks = reparam_blocks(model)
    for name, block in blocks.items():
        check = getattr(block, 'check_foldable', None)
        if check is not None:
            try:
                check()
            except NotFoldableError as error:
                raise NotFoldableError(f'{name or type(block).__name__}.{error}') from None
    report = DeployReport(params_before=count_parameters(model))
    for name, block in blocks.items():
        known = report.deployed if getattr(block, 'deploy', False) else report.switched
        known.append(name)
    # The largest first: what fusing takes for a moment is on top of what is fused.
    for block in sorted(blocks.values(), key=count_parameters, reverse=True):
        before = list(block.parameters())
        block.switch_to_deploy()
        if release is not None:
            release(before)
    for module in model.modules():
        if _offers_switch(module):
            # Bodies carry the flag of their blocks, as mmpretrain's do.
            module.deploy = True
        if callable(getattr(module, 'fuse_plain_units', None)):
            module.fuse_plain_units()
    report.params_after = count_parameters(model)
    return report


@torch.no_grad()
def fuse_conv_norm(conv: nn.Module, norm: nn.Module) -> nn.Module | None:
    """One conv that equals ``norm(conv(x))`` in eval mode, fused in float64.

    Args:
        conv: A conv; it is not changed.
        norm: The norm after it.

    Returns:
        A conv of the type that is registered for the conv's, without hooks and
        parametrizations, or ``None`` where the two are not one conv, or none that takes
        ``nn.Conv2d``'s arguments.
    """
    if not isinstance(conv, nn.Conv2d):
        return None
    # Any size will do: the conv's kernel is the frame's, whatever the padding.
    unit, size = {'unit': nn.Sequential(conv, norm)}, (1, 1)
    try:
        frame = conv_geometry(conv)
        fold_branches(unit, frame, size, device='meta')
        weight, bias = fold_branches(unit, frame, size, torch.float64)
    except NotFoldableError:
        return None
    # Made anew: a copy would have the conv's hooks and parametrizations, which set the
    # weight again.
    arguments = {**asdict(frame), 'bias': True, 'padding_mode': conv.padding_mode}
    if conv.padding_mode == 'zeros':
        # Not every conv type knows this argument.
        del arguments['padding_mode']
    try:
        with torch.device('meta'):
            fused = linear_conv_type(conv)(**arguments)
    except TypeError:
        # A type that is made of other arguments.
        return None
    parameters = list(conv.parameters())
    like, trainable = parameters[0], any(p.requires_grad for p in parameters)
    fused.weight = nn.Parameter(weight.to(like), trainable)
    fused.bias = nn.Parameter(bias.to(like), trainable)
    return fused.train(conv.training)


def count_parameters(model: nn.Module) -> int:
    """The number of parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())
