"""Conv layers that are made of blocks, for the ``conv_cfg`` of any host's model.

A config's ``conv_cfg=dict(type='mmrep.DBBConv2d')`` puts blocks into any backbone, neck or
head that builds its convs by mmcv. The norm that the host has after a conv stays there. A
plain network's weights load, strictly, and :func:`~mmrep.expansion.collapse` gives it back.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from mmcv.cnn import build_conv_layer
from torch import nn

from mmrep.models.blocks import DiverseBranchBlock, ReparamBlock, RepVGGBlock
from mmrep.models.blocks.base import Size, pair
from mmrep.registry import MODELS

from .expand import block_of
from .place import add_plain_keys

_CONV_ARGUMENTS = inspect.signature(nn.Conv2d).parameters.keys()


@MODELS.register_module(name='DBBConv2d')
def build_dbb_conv(
    *args: Any, kernel_sizes: Sequence[int | Size] = (3, 5), **kwargs: Any
) -> nn.Module:
    """``y = conv(x) + 1x1(x) + 1x1-kxk(x) + 1x1-avg(x)``; norms in all but the first.

    See :class:`~mmrep.models.blocks.DiverseBranchBlock`.

    Args:
        *args, **kwargs: What ``nn.Conv2d`` takes, which is the first branch, and options of
            the block by name, as ``norm_cfg``; ``conv_cfg`` is the type of its convs.
        kernel_sizes: Other kernels are plain convs. Default: 3 and 5.

    Raises:
        ValueError: If no block can stand for such a conv.
        TypeError: If the block does not take an option.
    """
    return _conv_layer(DiverseBranchBlock, kernel_sizes, args, kwargs)


@MODELS.register_module(name='RepVGGConv2d')
def build_repvgg_conv(*args: Any, **kwargs: Any) -> nn.Module:
    """``y = conv3x3(x) + norm(conv1x1(x)) + norm(x)``; other kernels are plain convs.

    See :class:`~mmrep.models.blocks.RepVGGBlock`; the arguments are those of
    :func:`build_dbb_conv`.
    """
    return _conv_layer(RepVGGBlock, (3,), args, kwargs)


#: What a ``conv_cfg`` can name.
CONV_LAYERS = (build_dbb_conv, build_repvgg_conv)


def _conv_layer(
    kind: type[ReparamBlock],
    kernel_sizes: Sequence[int | Size],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> nn.Module:
    of_conv = {name: kwargs[name] for name in kwargs if name in _CONV_ARGUMENTS}
    options = {name: kwargs[name] for name in kwargs if name not in _CONV_ARGUMENTS}
    conv = build_conv_layer(options.pop('conv_cfg', None), *args, **of_conv)
    if conv.kernel_size not in {pair(size) for size in kernel_sizes}:
        return conv
    block = block_of(kind, options, conv)
    add_plain_keys(block, '')
    return block
