"""The scales that RepOptimizer found, and what they make of a plain conv."""

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
from mmengine.model import kaiming_init
from torch import Tensor, nn

from mmrep.checkpoints import listed, read_checkpoint, state_dict_of
from mmrep.errors import ConfigError
from mmrep.models.blocks import ConvNormBlock, ScaleSumBlock
from mmrep.registry import WEIGHT_INITIALIZERS

#: The factors of a block's branches, by their names.
Scales = Mapping[str, Tensor]

_SCALE = re.compile(r'(.+)\.(branch_(?:kxk|1x1|identity))\.scale\.weight')


def read_scales(path: str | Path) -> dict[str, Scales]:
    """The scales of every ``ScaleSumBlock`` in a checkpoint, by the blocks' names.

    Raises:
        CheckpointError: If the file cannot be read.
        ConfigError: If there is no such block in it.
    """
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, value in state_dict_of(read_checkpoint(path), path).items():
        if match := _SCALE.fullmatch(key):
            found[match[1]][match[2]] = value
    if not found:
        raise ConfigError(
            f'{path} has no scales: give a checkpoint in train form of a network with '
            "block_cfg=dict(type='mmrep.ScaleSumBlock')"
        )
    return found


def scaled_convs(
    model: nn.Module, scales: Mapping[str, Scales], path: str | Path
) -> dict[str, ConvNormBlock]:
    """The plain blocks of a model that scales are for, by name.

    Args:
        model: The model.
        scales: Those of every block.
        path: The file that they are from, for the error.

    Raises:
        ConfigError: If the model has no such block for one of them.
    """
    modules = dict(model.named_modules())
    found = {name: modules.get(name) for name in scales}
    missing = [
        name
        for name, block in found.items()
        if not isinstance(block, ConvNormBlock) or block.deploy
    ]
    if missing:
        raise ConfigError(
            f'{path} has scales of {listed(missing)}, which are no ConvNormBlocks in train '
            'form of this model: search with the same network'
        )
    return found


@torch.no_grad()
def scale_sum(block: ConvNormBlock, scales: Scales, power: int = 1) -> ScaleSumBlock:
    """The scaled branches that a plain block's conv stands for, with kernels of ones.

    Args:
        block: The plain block.
        scales: The factors of the branches.
        power: What they are raised to. Default: 1.

    Raises:
        ConfigError: If they are those of another block.
    """
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
        raise ConfigError(f'scales of {shapes}, where the block has {expected}')
    for name, scale in own.items():
        scale.weight.copy_(scales[name] ** power)
    for name in ('branch_kxk', 'branch_1x1'):
        nn.init.ones_(branches.get_submodule(name).conv.weight)
    return branches


@WEIGHT_INITIALIZERS.register_module('SearchedScales')
class SearchedScalesInit:
    """Let plain convs start as sums of branches: ``W = s_k W_k + s_1 W_1 + s_0 I``.

    ``W_k`` is the kernel that is there, as of initializers named before this one, and
    ``W_1`` one of 1x1, drawn as Kaiming's.

    Source: `Re-parameterizing Your Optimizers rather than Architectures
    <https://arxiv.org/abs/2205.15242>`_, section 3.3, rule of initialization.

    Args:
        scales (str): A checkpoint of the search, a network of ``ScaleSumBlock``.
        prefix (str): What the names there begin with and the ones here do not.
            Default: ``'backbone.'``.
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
        for name, block in scaled_convs(module, scales, self.scales).items():
            branches = scale_sum(block, scales[name])
            branches.branch_kxk.conv.weight.copy_(block.weight)
            kaiming_init(branches.branch_1x1.conv)
            block.weight.copy_(branches.sum_kernel())
