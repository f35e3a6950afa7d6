"""Conv layers that are made of blocks, for the ``conv_cfg`` of any host's model.

A config's ``conv_cfg=dict(type='mmrep.DBBConv2d')`` puts blocks into any backbone, neck or
head that builds its convs by mmcv. The host's norm after a conv stays where it is. Weights
of the plain network load strictly, and :func:`~mmrep.expansion.collapse` gives the plain
network back.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from mmcv.cnn import build_conv_layer
from torch import nn

from mmrep.models.blocks import (
    AsymmetricConvBlock,
    BranchBlock,
    DilatedReparamBlock,
    DiverseBranchBlock,
    LargeKernelBlock,
    MobileOneBlock,
    OREPABlock,
    OREPARepVGGBlock,
    QARepVGGBlock,
    ReparamBlock,
    RepVGGBlock,
)
from mmrep.models.blocks.base import Size, pair
from mmrep.registry import MODELS

from .expand import block_of
from .place import add_plain_keys

_CONV_ARGUMENTS = inspect.signature(nn.Conv2d).parameters.keys()


def _layer(
    name: str, kind: type[ReparamBlock], kernel_sizes: Sequence[int | Size] = (3, 5)
) -> Callable[..., nn.Module]:
    """Register a conv layer by the short name of its block; returns what builds it."""

    def build(
        *args: Any, kernel_sizes: Sequence[int | Size] = kernel_sizes, **kwargs: Any
    ) -> nn.Module:
        conv_args = {key: kwargs.pop(key) for key in list(kwargs) if key in _CONV_ARGUMENTS}
        conv = build_conv_layer(kwargs.pop('conv_cfg', None), *args, **conv_args)
        if conv.kernel_size not in {pair(size) for size in kernel_sizes}:
            return conv
        block = block_of(kind, kwargs, conv)
        add_plain_keys(block, '')
        return block

    # The name by which a lazy config imports it.
    build.__name__ = build.__qualname__ = f'build_{name.lower()}_conv'
    build.__doc__ = f"""Build a conv as the main branch of a {kind.__name__}.

    The block has no activation. A norm after the block is left to the host.

    Args:
        *args, **kwargs: What ``nn.Conv2d`` takes, and options of the block by name, as
            ``norm_cfg``; ``conv_cfg`` is the type of its convs.
        kernel_sizes: Convs of other sizes stay plain convs. Default: {kernel_sizes}.

    Raises:
        ValueError: If no block can stand for such a conv.
        TypeError: If the block does not take an option.
    """
    return MODELS.register_module(name=f'{name}Conv2d', module=build)


_LARGE = (5, 7, 9, 11, 13, 15, 17)

build_acb_conv = _layer('ACB', AsymmetricConvBlock)
build_branch_conv = _layer('Branch', BranchBlock)
build_dbb_conv = _layer('DBB', DiverseBranchBlock)
build_dilatedreparam_conv = _layer('DilatedReparam', DilatedReparamBlock, _LARGE)
build_largekernel_conv = _layer('LargeKernel', LargeKernelBlock, (*_LARGE, 31))
build_mobileone_conv = _layer('MobileOne', MobileOneBlock)
build_orepa_conv = _layer('OREPA', OREPABlock)
build_oreparepvgg_conv = _layer('OREPARepVGG', OREPARepVGGBlock)
build_qarepvgg_conv = _layer('QARepVGG', QARepVGGBlock)
build_repvgg_conv = _layer('RepVGG', RepVGGBlock, (3,))

#: What a ``conv_cfg`` can name.
CONV_LAYERS = (
    build_acb_conv,
    build_branch_conv,
    build_dbb_conv,
    build_dilatedreparam_conv,
    build_largekernel_conv,
    build_mobileone_conv,
    build_orepa_conv,
    build_oreparepvgg_conv,
    build_qarepvgg_conv,
    build_repvgg_conv,
)
