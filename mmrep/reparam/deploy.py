"""Walk a model and turn every re-parameterizable block into one conv."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from .fold import fold_branches, has_running_statistics
from .foreign import has_reparam_conv, is_inside, switch_method, switched
from .geometry import NotFoldableError, conv_geometry, linear_conv_type
from .modules import names_of, set_submodule


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


def reparam_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a model that can be switched, by name.

    A block is a module with a :func:`switch_method`, except for

    - containers whose ``switch_to_deploy`` only walks over the blocks inside: modules with
      a true attribute ``walks_over_blocks``, and modules of other packages that contain a
      module with ``switch_to_deploy``;
    - modules inside a block of mmrep, which folds them itself;
    - modules with another method than ``switch_to_deploy`` inside a block of another
      package, which fuses them itself.
    """
    blocks: dict[str, nn.Module] = {}
    own: list[str] = []
    foreign: list[str] = []
    for name, module in model.named_modules():
        method = switch_method(module)
        if (
            method is None
            or getattr(module, 'walks_over_blocks', False)
            or any(is_inside(outer, name) for outer in own)
        ):
            continue
        if hasattr(module, 'check_foldable'):
            own.append(name)
        else:
            if method == 'switch_to_deploy':
                inner = (m for m in module.modules() if m is not module)
                if any(switch_method(m) == method for m in inner):
                    continue
            elif any(is_inside(outer, name) for outer in foreign):
                continue
            foreign.append(name)
        blocks[name] = module
    return blocks


def switch_to_deploy(model: nn.Module, keep_norm: bool = False) -> DeployReport:
    """Turn every block of a model into the one conv that it equals, in place.

    A second call changes nothing. Every block of mmrep is checked before the first block
    is changed. Blocks of other packages, which cannot be checked, are switched first,
    inner before outer. Of a container of another package only the blocks are switched; its
    own ``switch_to_deploy`` is not called. Train or eval mode, device, dtype and
    ``requires_grad`` stay as they are.

    Args:
        model: Any module; blocks of other packages are switched by their own method, see
            :func:`switch_method`, and replaced by what it returns, if that is a module.
        keep_norm: Whether to keep a norm after each conv, for further training, such as
            quantization-aware training. Each block is replaced by a
            ``mmrep.ConvNormBlock`` of the same function, which a later call fuses. Norms
            outside the blocks stay, too. Default: False.

    Returns:
        The names of the blocks and the numbers of parameters.

    Raises:
        NotFoldableError: If a block cannot be one conv; names the block, the branch and
            the reason. The model is unchanged, except for blocks of other packages that
            were switched before one whose own method fails.
    """
    if keep_norm:
        return _to_conv_norm(model)
    blocks = reparam_blocks(model)
    report = DeployReport(params_before=count_parameters(model))
    for name, block in blocks.items():
        if getattr(block, 'deploy', False) or has_reparam_conv(block):
            report.deployed.append(name)
            continue
        if hasattr(block, 'check_foldable'):
            try:
                block.check_foldable()
            except NotFoldableError as error:
                raise NotFoldableError(f'{name or type(block).__name__}.{error}') from None
        report.switched.append(name)
    # Blocks of other packages, which could not be checked, first; inner before outer.
    order = report.switched[::-1]
    order.sort(key=lambda name: hasattr(blocks[name], 'check_foldable'))
    names = names_of(model)
    for name in order:
        block = blocks[name]
        keys = list(block.state_dict())
        result = _switched(block, name)
        if result is not block:
            if not name:
                raise NotFoldableError(
                    f'{type(block).__name__}: its own {switch_method(block)} returns '
                    'another module, which cannot replace the model in place: call that '
                    'method instead and use what it returns'
                )
            for each in names[block]:
                set_submodule(model, each, result)
        elif (
            switch_method(block) != 'switch_to_deploy' and list(block.state_dict()) == keys
        ):
            # It was in deploy form already, but has no attribute that says so.
            report.switched.remove(name)
            report.deployed.append(name)
    for module in model.modules():
        if callable(getattr(module, 'fuse_plain_units', None)):
            module.fuse_plain_units()
    report.params_after = count_parameters(model)
    return report


def _to_conv_norm(model: nn.Module) -> DeployReport:
    """Replace every block of a model by one conv and one norm, all or none."""
    report = DeployReport(params_before=count_parameters(model))
    results = {}
    for name, block in reparam_blocks(model).items():
        if not name or not hasattr(block, 'conv_norm_form'):
            raise NotFoldableError(
                f'{name or "the model"} is a {type(block).__name__}, which cannot keep a '
                'norm: give a model whose blocks are submodules from mmrep'
            )
        try:
            results[name] = block.conv_norm_form()
        except NotFoldableError as error:
            raise NotFoldableError(f'{name}: {error}') from None
    names = names_of(model)
    for name, result in results.items():
        block = model.get_submodule(name)
        (report.deployed if result is block else report.switched).append(name)
        for each in names[block]:
            set_submodule(model, each, result)
    report.params_after = count_parameters(model)
    return report


def _switched(block: nn.Module, name: str) -> nn.Module:
    """Call :func:`~mmrep.reparam.foreign.switched`; any error is a ``NotFoldableError``."""
    name = name or type(block).__name__
    try:
        result = switched(block)
    except NotFoldableError:
        raise
    except Exception as error:
        # The method of another package may raise any exception.
        raise NotFoldableError(
            f'{name}: its own {switch_method(block)} raises {type(error).__name__}: {error}'
        ) from error
    return result


def fuse_conv_norm(conv: nn.Module, norm: nn.Module) -> nn.Module | None:
    """One conv that equals ``norm(conv(x))`` in eval mode, fused in float64.

    Args:
        conv: A conv; it is not changed.
        norm: The norm after it.

    Returns:
        A conv of the type that :func:`~mmrep.reparam.linear_conv_type` gives, without hooks
        and parametrizations; ``None`` if no single conv equals the two, or if that type
        does not take ``nn.Conv2d``'s arguments.
    """
    if not has_running_statistics(norm):
        return None
    try:
        geometry = conv_geometry(conv)
        # Any input size will do: the kernel keeps its size, whatever the padding.
        size, unit = geometry.kernel_size, {'conv and norm': nn.Sequential(conv, norm)}
        folded = fold_branches(unit, geometry, size, torch.float64)
    except NotFoldableError:
        return None
    # Not a copy: that would have the conv's hooks and parametrizations, which would
    # overwrite the weight.
    arguments = asdict(geometry)
    if conv.padding_mode == 'zeros':
        # Not every conv type takes this argument.
        del arguments['padding_mode']
    try:
        with torch.device('meta'):
            fused = linear_conv_type(conv)(**arguments)
    except TypeError:
        # This type takes other arguments.
        return None
    set_kernel(fused, folded.weight, folded.bias, conv.parameters())
    return fused.train(conv.training)


def set_kernel(
    conv: nn.Module, weight: Tensor, bias: Tensor, replaced: Iterable[nn.Parameter]
) -> None:
    """Set the weight and bias of a conv, in the dtype and layout of what they replace.

    Args:
        conv: The conv; its own tensors may be on the meta device.
        weight: Its new kernel.
        bias: Its new bias.
        replaced: The parameters that the two replace. Weight and bias get the dtype, device
            and memory format of the first kernel among them, and require gradients if any
            of them does.
    """
    replaced = list(replaced)
    like = next((p for p in replaced if p.dim() == 4), replaced[0])
    trainable = any(parameter.requires_grad for parameter in replaced)
    channels_last = like.is_contiguous(memory_format=torch.channels_last)
    contiguous = like.is_contiguous() or not channels_last
    layout = torch.contiguous_format if contiguous else torch.channels_last
    conv.weight = nn.Parameter(weight.to(like, memory_format=layout), trainable)
    conv.bias = nn.Parameter(bias.to(like), trainable)


def count_parameters(model: nn.Module) -> int:
    """The number of parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())
