"""Load the weights of a checkpoint into a model, strictly."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.model import is_model_wrapper
from torch import Size, Tensor, nn

from mmrep.errors import CheckpointError, printable, reason

#: How many keys of each kind an error lists.
_LISTED = 8

#: Entries of ``meta`` to keep: what the classes are, and how far the training went.
_KEPT_META = ('dataset_meta', 'CLASSES', 'PALETTE', 'epoch', 'iter', 'experiment_name')


def state_dict_of(checkpoint: Any, source: str | Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint, without wrappers and ``module.`` prefixes.

    Args:
        checkpoint: What :func:`read_checkpoint` returned: a state dict, or a dict that
            holds one as ``state_dict`` or ``model``.
        source: The file, for the error.

    Raises:
        CheckpointError: If there is no state dict.
    """
    state = checkpoint if isinstance(checkpoint, Mapping) else {}
    wrapped = (state.get(wrapper) for wrapper in ('state_dict', 'model'))
    state = next((inner for inner in wrapped if isinstance(inner, Mapping)), state)
    tensors = all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    )
    if not (tensors and state):
        raise CheckpointError(
            f'{source} holds no state dict: give a checkpoint with the weights of a model'
        )
    # DistributedDataParallel gives all keys this prefix; a model may give it to some.
    prefix = 'module.' if all(key.startswith('module.') for key in state) else ''
    return {key.removeprefix(prefix): value for key, value in state.items()}


def is_deploy_form(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has the keys of fused blocks."""
    return any(re.search(r'\b(branch|lkb)_reparam\.', key) for key in state_dict)


def load_strictly(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    source: str | Path,
    assign: bool = False,
) -> None:
    """Load a state dict of exactly the model's keys and shapes.

    The model's load-state-dict pre-hooks run first: they rename older keys, or those of
    the plain convs that blocks replace. Floating-point values are converted to the model's
    precision. Integers become floating-point values, and the reverse, only if no value
    changes. Complex values do not become real, nor real ones complex.

    Args:
        model: The model, or its wrapper for distributed training; unchanged if the keys
            or shapes do not match.
        state_dict: The weights.
        source: The file, for the error.
        assign: Whether the model takes the tensors themselves, where they have its
            dtype, instead of copying their values. Default: False.

    Raises:
        CheckpointError: If keys are missing or unexpected, or have another shape or a
            dtype that cannot be converted; lists them.
    """
    if is_model_wrapper(model):
        model = model.module
    try:
        state_dict = _as_read_by(model, state_dict)
    except Exception as error:
        raise CheckpointError(
            f'{source} does not fit the config: give the config that it was trained with '
            f'({reason(error)})'
        ) from error
    own = model.state_dict()
    shapes = {key: value.shape for key, value in own.items()}
    dtypes = {key: value.dtype for key, value in own.items()}
    problems = misfits(shapes, state_dict, dtypes)
    if problems:
        raise CheckpointError(
            f'{source} does not fit the config: {_advice(state_dict, own)} ({problems})'
        )
    # The keys are now the model's own, which the pre-hooks do not change again.
    if assign:
        state_dict = {key: value.to(own[key]) for key, value in state_dict.items()}
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    model.load_state_dict(state_dict, strict=False, assign=assign)
    for name, parameter in model.named_parameters():
        # torch 2.1 loses this flag of a tensor that is assigned.
        parameter.requires_grad_(trainable[name])
    if not model.training:
        # mmpretrain's LeViT caches values of its biases in eval(): compute them again.
        model.eval()


def _as_read_by(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy of a state dict, changed by the model's load-state-dict pre-hooks."""
    state_dict = dict(state_dict)
    for name, module in model.named_modules():
        prefix = f'{name}.' if name else ''
        for hook in module._load_state_dict_pre_hooks.values():
            hook(state_dict, prefix, {}, True, [], [], [])
    return state_dict


def misfits(
    shapes: Mapping[str, Size],
    state_dict: Mapping[str, Tensor],
    dtypes: Mapping[str, torch.dtype],
    origin: Mapping[str, str] | None = None,
) -> str:
    """Describe which weights do not fit a model; '' if all fit.

    Args:
        shapes: The shapes of the model's weights.
        state_dict: The weights.
        dtypes: The dtypes of the model's weights; float32 for keys that are not in it.
        origin: The source's name of each of the model's keys. Default: None, the same.
    """
    origin = origin or {}
    # Weights from before torch 1.0 lack this counter, on which no output depends.
    needed = [key for key in shapes if not key.endswith('num_batches_tracked')]
    found = {
        'missing': [key for key in needed if key not in state_dict],
        'unexpected': [origin.get(key, key) for key in state_dict if key not in shapes],
        'of another shape': [
            f'{origin.get(key, key)} ({tuple(state_dict[key].shape)} in the file, '
            f'{tuple(shape)} in the model)'
            for key, shape in shapes.items()
            if key in state_dict and state_dict[key].shape != shape
        ],
        'of incompatible dtype': [
            f'{origin.get(key, key)} ({value.dtype} in the file, {dtype} in the model)'
            for key, value in state_dict.items()
            if key in shapes and not _can_be(value, dtype := dtypes.get(key, torch.float32))
        ],
    }
    return '; '.join(
        f'{len(keys)} {kind}: {listed(keys)}' for kind, keys in found.items() if keys
    )


def _can_be(value: Tensor, dtype: torch.dtype) -> bool:
    """Whether a tensor keeps its values in another dtype, apart from float rounding."""
    if value.is_complex() or dtype.is_complex:
        return value.is_complex() and dtype.is_complex
    if value.dtype == dtype or (value.is_floating_point() and dtype.is_floating_point):
        return True
    return torch.equal(value.to(dtype).double(), value.double())


def listed(keys: Iterable[str]) -> str:
    """The first keys, and how many more there are."""
    keys = [printable(key, 200) for key in keys]
    rest = len(keys) - _LISTED
    return ', '.join(keys[:_LISTED]) + (f', and {rest} more' if rest > 0 else '')


def kept_meta(checkpoint: Any) -> dict:
    """The entries of a checkpoint's meta that a file converted from it keeps."""
    meta = checkpoint.get('meta') if isinstance(checkpoint, Mapping) else None
    meta = meta if isinstance(meta, Mapping) else {}
    return {key: meta[key] for key in _KEPT_META if key in meta}


def _advice(state_dict: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    deploy = is_deploy_form(state_dict)
    if deploy == is_deploy_form(own):
        return 'give the config that it was trained with'
    form = 'deploy' if deploy else 'train'
    fitting = 'tools/reparam.py wrote beside it' if deploy else 'it was trained with'
    return f'it is in {form} form and the config is not, so give the config that {fitting}'
