"""The scales of RepOptimizer's search, and the branches that they give a plain conv."""

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
from mmengine.model import kaiming_init
from torch import Tensor, nn

from mmrep.errors import ConfigError
from mmrep.models.blocks import ConvNormBlock, ScaleSumBlock
from mmrep.registry import WEIGHT_INITIALIZERS

#: The scales of a block's branches, by the branches' names.
Scales = Mapping[str, Tensor]

_SCALE = re.compile(r'(.+)\.(branch_(?:kxk|1x1|identity))\.scale\.weight')


def read_scales(path: str | Path) -> dict[str, Scales]:
    """The scales of every ``ScaleSumBlock`` in a checkpoint, by the blocks' names.

    Raises:
        CheckpointError: If the file cannot be read.
        ConfigError: If it has no such block, or a scale is nan or inf.
    """
    # Imported here, because importing mmrep does not need it.
    from mmrep.checkpoints import read_checkpoint, state_dict_of

    if not isinstance(path, str | Path):
        raise ConfigError(f'scales are the path of a checkpoint, not {path!r}')
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, value in state_dict_of(read_checkpoint(path), path).items():
        if match := _SCALE.fullmatch(key):
            if not value.isfinite().all():
                raise ConfigError(
                    f'{path} holds scales that are nan or inf ({key}): give a checkpoint '
                    'from before the search diverged'
                )
            found[match[1]][match[2]] = value
    if not found:
        raise ConfigError(
            f'{path} has no scales: give a checkpoint in train form of a network with '
            "block_cfg=dict(type='mmrep.ScaleSumBlock')"
        )
    return found


def scaled_convs(
    model: nn.Module, scales: Mapping[str, Scales], path: str | Path
) -> dict[str, tuple[ConvNormBlock, ScaleSumBlock]]:
    """Each plain block of a model, with the scaled branches that it stands for.

    The kernels of the branches are ones.

    Args:
        model: The model.
        scales: The scales of every block, by the blocks' names.
        path: The file that they are from, for the error.

    Raises:
        ConfigError: If the scales belong to another network.
    """
    blocks = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ConvNormBlock) and not module.deploy
    }
    if different := sorted(set(scales) ^ set(blocks)):
        raise ConfigError(
            f'{path} has the scales of another network (they differ in '
            f'{", ".join(different[:5])}): search with the network that you train, and '
            'train it with ConvNormBlocks that are not fused'
        )
    try:
        return {
            name: (blocks[name], _scale_sum(blocks[name], scales[name])) for name in scales
        }
    except ValueError as error:
        raise ConfigError(f'{path} does not fit this network: {error}') from None


@torch.no_grad()
def _scale_sum(block: ConvNormBlock, scales: Scales) -> ScaleSumBlock:
    """The scaled branches that a plain block's conv stands for, in float64.

    Raises:
        ValueError: If the scales do not fit the block, or its conv is not an
            ``nn.Conv2d``.
    """
    if type(block.main_conv) is not nn.Conv2d:
        raise ValueError(f'{type(block.main_conv).__name__} is not an nn.Conv2d')
    branches = ScaleSumBlock(
        block.in_channels,
        block.out_channels,
        block.kernel_size,
        stride=block.stride,
        padding=block.padding,
        dilation=block.dilation,
        groups=block.groups,
    ).to(block.weight.device, torch.float64)
    own = {name: branch.scale for name, branch in branches.branches().items()}
    shapes = {name: tuple(value.shape) for name, value in scales.items()}
    expected = {name: tuple(scale.weight.shape) for name, scale in own.items()}
    if shapes != expected:
        raise ValueError(f'the scales have shapes {shapes}, and the block needs {expected}')
    for name, scale in own.items():
        scale.weight.copy_(scales[name])
    for name in ('branch_kxk', 'branch_1x1'):
        nn.init.ones_(branches.get_submodule(name).conv.weight)
    return branches


@WEIGHT_INITIALIZERS.register_module('SearchedScales')
class SearchedScalesInit:
    """Initialize plain convs as sums of branches: ``W = s_k W_k + s_1 W_1 + s_0 I``.

    ``W_k`` is the current kernel, which initializers before this one may have set, and
    ``W_1`` is a 1x1 kernel with Kaiming initialization.

    Source: `Re-parameterizing Your Optimizers rather than Architectures
    <https://arxiv.org/abs/2205.15242>`_, section 3.3, rule of initialization.

    Args:
        scales (str): A checkpoint of the search, a network of ``ScaleSumBlock``.
        prefix (str): Prefix of the block names in the checkpoint that this module's names
            lack. Default: ``'backbone.'``.
    """

    def __init__(self, scales: str, prefix: str = 'backbone.') -> None:
        self.scales = scales
        self.prefix = prefix

    @torch.no_grad()
    def __call__(self, module: nn.Module) -> None:
        scales = {
            name.removeprefix(self.prefix): value
            for name, value in read_scales(self.scales).items()
            if name.startswith(self.prefix)
        }
        if not scales:
            raise ConfigError(
                f'{self.scales} has no scales whose names begin with {self.prefix!r}: give '
                "SearchedScales another prefix, '' for none"
            )
        for block, branches in scaled_convs(module, scales, self.scales).values():
            branches.branch_kxk.conv.weight.copy_(block.weight)
            kaiming_init(branches.branch_1x1.conv)
            block.weight.copy_(branches.sum_kernel())
