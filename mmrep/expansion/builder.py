"""Build an expanded model from a config."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.registry import MODELS as MMENGINE_MODELS
from torch import Tensor, nn

from mmrep.hosts import forward
from mmrep.registry import MODELS

from .expand import expand as expand_model

#: Side of the example image, and of the largest example feature map, in pixels.
_IMAGE, _MAP = 224, 32


@MODELS.register_module(name='Expanded')
def build_expanded(expand: Mapping[str, Any], **host: Any) -> nn.Module:
    """Build a host's model with blocks in place of its convs: ``type='mmrep.Expanded'``.

    The model is of the host's own class, and every other key of the config is an argument
    of that class. A config of three lines is enough::

        _base_ = 'resnet50_8xb32_in1k.py'
        block = dict(type='mmrep.DiverseBranchBlock')
        model = dict(type='mmrep.Expanded', expand=dict(of='ImageClassifier', block=block))

    The same two keys expand a part of a model alone: its backbone, neck or head.

    Args:
        expand: ``of`` is the type of the host's model, and ``block`` the config of the
            block. ``shape`` is the shape of an example input without the batch, or a list
            of shapes for a module that takes several feature maps. Default: 224 x 224
            pixels; for a list of ``in_channels``, feature maps of 32 x 32, 16 x 16, ...
            pixels. The others are arguments of :func:`~mmrep.expansion.expand`:
            ``kernel_sizes``, ``include``, ``exclude``.
        **host: The arguments of the host's model.

    Raises:
        TypeError: If ``expand`` lacks ``of`` or ``block``, or has an unknown key.
        ValueError: If the model cannot be expanded with these options.
    """
    options = dict(expand)
    try:
        of, block = options.pop('of'), options.pop('block')
    except KeyError as error:
        raise TypeError(
            f'expand has no {error}: give the type of the model, and a block, as expand='
            "dict(of='ImageClassifier', block=dict(type='mmrep.DiverseBranchBlock'))"
        ) from None
    shape = options.pop('shape', None)
    if unknown := options.keys() - {'kernel_sizes', 'include', 'exclude'}:
        raise TypeError(f'expand takes no key {min(unknown)!r}: leave it out')
    model = MMENGINE_MODELS.build(dict(host, type=of))
    x = _noise(shape or _shape(model, host.get('in_channels')), next(model.parameters()))

    def run(model: nn.Module) -> Any:
        try:
            return forward(model, x)
        except Exception as error:
            shapes = [tuple(t.shape[1:]) for t in ([x] if isinstance(x, Tensor) else x)]
            raise ValueError(
                f'{of} does not take an input of shape {", ".join(map(str, shapes))} '
                f'({type(error).__name__}: {error}): give expand a fitting shape'
            ) from error

    expand_model(model, block, run, **options)
    return model


def _shape(model: nn.Module, channels: Any) -> Sequence[int] | list[Sequence[int]]:
    """The shape of an example input, by a model's ``in_channels`` or its first conv."""
    if isinstance(channels, list | tuple):
        sizes = (max(1, _MAP >> level) for level in range(len(channels)))
        return [(n, size, size) for n, size in zip(channels, sizes, strict=True)]
    if not isinstance(channels, int):
        convs = (m for m in model.modules() if isinstance(m, nn.Conv2d))
        channels = next((conv.in_channels for conv in convs), 3)
    return channels, _IMAGE, _IMAGE


def _noise(shape: Sequence, like: Tensor) -> Tensor | list[Tensor]:
    """A random input of a shape, or a list of them; the random state is left alone."""
    if not isinstance(shape[0], int):
        return [_noise(each, like) for each in shape]
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, *shape, generator=generator).to(like)
