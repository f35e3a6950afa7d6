"""UniRepLKNet."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from mmcv.cnn import build_activation_layer, build_conv_layer
from mmcv.cnn.bricks import DropPath
from mmengine.model import BaseModule, Sequential
from torch import Tensor, nn

from mmrep.registry import MODELS

from ..layers import GRN, LayerNorm2d, run_block
from .base import (
    ReparamBackbone,
    find_arch,
    require,
    require_one_per_stage,
    stage_indices,
)
from .units import UnitConfig

#: Ratio of the channels between a block's 1x1 convs to its own, and of its own to those
#: between the convs of its SE layer.
_EXPANSION, _SE_RATIO = 4, 4


def _arch(
    base_channels: int, depths: Sequence[int], pattern: Sequence[int] = (13,)
) -> dict:
    """An architecture whose third stage repeats a pattern of kernel sizes."""
    third = (pattern * depths[2])[: depths[2]]
    sizes = (3,) * depths[0], (13,) * depths[1], third, (13,) * depths[3]
    channels = tuple(base_channels * 2**i for i in range(4))
    return dict(channels=channels, kernel_sizes=sizes)


class UniRepLKNetBlock(BaseModule):
    """``y = x + pointwise_out(grn(act(pointwise_in(se(spatial(x))))))``.

    ``spatial`` is a depthwise block with norms, ``pointwise_in`` and ``pointwise_out`` are
    1x1 convs. The deploy form has these three convs and no norm.

    Source: `UniRepLKNet <https://arxiv.org/abs/2311.15599>`_, section 3.1 and figure 2.

    Args:
        channels (int): Number of input and output channels.
        kernel_size (int): Rows and columns of the depthwise conv.
        units (UnitConfig): How units are built.
        drop_path (float): Probability that an image skips the block in training.
            Default: 0.
    """

    def __init__(
        self, channels: int, kernel_size: int, units: UnitConfig, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.with_cp = units.with_cp
        inside = replace(units, act_cfg=None, with_cp=False)
        hidden = _EXPANSION * channels
        self.spatial = inside.block(
            channels,
            channels,
            kernel_size,
            groups=channels,
            se_cfg=dict(ratio=_SE_RATIO, divisor=1),
        )
        self.pointwise_in = build_conv_layer(units.conv_cfg, channels, hidden, 1)
        self.act = build_activation_layer(units.act_cfg)
        self.grn = GRN(hidden)
        self.pointwise_out = MODELS.build(
            dict(
                type='mmrep.PointwiseBlock',
                in_channels=hidden,
                out_channels=channels,
                conv_cfg=units.conv_cfg,
                norm_cfg=units.norm_cfg,
                act_cfg=None,
                deploy=units.deploy,
            )
        )
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """``(N, channels, H, W)`` to the same shape."""
        return x + self.drop_path(run_block(self, self._residual, x, self.with_cp))

    def _residual(self, x: Tensor) -> Tensor:
        hidden = self.grn(self.act(self.pointwise_in(self.spatial(x))))
        return self.pointwise_out(hidden)


@MODELS.register_module()
class UniRepLKNet(ReparamBackbone):
    """UniRepLKNet: stages of depthwise 13x13 and 3x3 blocks between pointwise convs.

    Source: `UniRepLKNet: A Universal Perception Large-Kernel ConvNet
    <https://arxiv.org/abs/2311.15599>`_, section 3.2 and table 4.

    Args:
        arch (str | dict): A name in ``arch_settings``, or a dict with the keys

            - **channels** (Sequence[int]): Number of channels of each stage.
            - **kernel_sizes** (Sequence[Sequence[int]]): Kernel size of each block of each
              stage.
        in_channels (int): Number of channels of the image. Default: 3.
        out_indices (Sequence[int] | int): Stages, from 0, whose outputs are returned, each
            after a norm of its own; negative ones count from the end. Default: ``(3, )``.
        gap_before_final_norm (bool): Whether each output is averaged over its pixels before
            its norm, as in mmpretrain's ``ConvNeXt``. The outputs are then ``(N, C)``, so
            that a linear head needs no neck. Default: True.
        drop_path_rate (float): Probability that an image skips the last block in training;
            from the first block on it rises linearly from 0. Default: 0.
        frozen_stages (int): Number of stages to freeze, with the stem. 0 freezes the stem
            alone. Default: -1, none.
        conv_cfg (dict, optional): Config of the convs. Default: None, ``nn.Conv2d``.
        norm_cfg (dict): Config of the norms in blocks. Default: ``dict(type='BN')``.
        act_cfg (dict): Config of the activations. Default: ``dict(type='GELU')``.
        with_cp (bool): Recompute blocks in the backward pass to save memory.
            Default: False.
        deploy (bool): Build every block as one conv. Default: False.
        norm_eval (bool): Keep batch norms in eval mode while training. Default: False.
        block_cfg (dict, optional): Config of the depthwise blocks: a type, and arguments
            for all of them; None for plain convs with norms.
            Default: ``dict(type='mmrep.DilatedReparamBlock', post_norm=True)``.
        reparam_kernels (Sequence[int]): Kernel sizes of the units that become this block;
            the others are plain. Default: ``(7, 9, 11, 13, 15, 17)``.
        init_cfg (dict | list[dict], optional): Initialization. Default: for convs, a
            truncated normal distribution of standard deviation 0.02, and biases of 0.

    Raises:
        ArchitectureError: If the arguments describe no network.
    """

    arch_settings = {
        'A': _arch(40, (2, 2, 6, 2)),
        'F': _arch(48, (2, 2, 6, 2)),
        'P': _arch(64, (2, 2, 6, 2)),
        'N': _arch(80, (2, 2, 8, 2)),
        'T': _arch(80, (3, 3, 18, 3), (13, 3)),
        'S': _arch(96, (3, 3, 27, 3), (13, 3, 3)),
        'B': _arch(128, (3, 3, 27, 3), (13, 3, 3)),
        'L': _arch(192, (3, 3, 27, 3), (13, 3, 3)),
        'XL': _arch(256, (3, 3, 27, 3), (13, 3, 3)),
    }

    def __init__(
        self,
        arch: str | dict,
        in_channels: int = 3,
        out_indices: Sequence[int] | int = (3,),
        gap_before_final_norm: bool = True,
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        conv_cfg: dict | None = None,
        norm_cfg: dict = dict(type='BN'),
        act_cfg: dict = dict(type='GELU'),
        with_cp: bool = False,
        deploy: bool = False,
        norm_eval: bool = False,
        block_cfg: dict | None = dict(type='mmrep.DilatedReparamBlock', post_norm=True),
        reparam_kernels: Sequence[int] = (7, 9, 11, 13, 15, 17),
        init_cfg: dict | Sequence[dict] | None = dict(
            type='TruncNormal', layer='Conv2d', std=0.02, bias=0.0
        ),
    ) -> None:
        super().__init__(frozen_stages, norm_eval, init_cfg)
        self.arch = arch = find_arch(arch, self.arch_settings, ('channels', 'kernel_sizes'))
        require_one_per_stage(**arch)
        require(
            all(isinstance(sizes, Sequence) for sizes in arch['kernel_sizes']),
            'kernel_sizes must have a sequence for each stage, with a size for each block, '
            f'not {arch["kernel_sizes"]}',
        )
        indices = stage_indices(out_indices, len(arch['channels']))
        self.in_channels = in_channels
        self.out_indices = tuple(sorted(indices))
        self.gap_before_final_norm = gap_before_final_norm
        self.units = UnitConfig(
            conv_cfg, norm_cfg, act_cfg, block_cfg, deploy, reparam_kernels, with_cp
        )

        channels = arch['channels']
        first = channels[0]
        self.stem = Sequential(
            self._downsample(in_channels, first // 2),
            build_activation_layer(act_cfg),
            self._downsample(first // 2, first),
        )
        depths = [len(sizes) for sizes in arch['kernel_sizes']]
        rates = iter(np.linspace(0, drop_path_rate, sum(depths)).tolist())
        self.stages = [f'stage_{i + 1}' for i in range(len(depths))]
        for i, sizes in enumerate(arch['kernel_sizes']):
            blocks = [
                UniRepLKNetBlock(channels[i], size, self.units, next(rates))
                for size in sizes
            ]
            stage = OrderedDict()
            if i:
                stage['downsample'] = self._downsample(channels[i - 1], channels[i])
            stage['blocks'] = Sequential(*blocks)
            self.add_module(self.stages[i], Sequential(stage))
            if i in self.out_indices:
                kind = nn.LayerNorm if gap_before_final_norm else LayerNorm2d
                self.add_module(f'norm_{i + 1}', kind(channels[i], eps=1e-6))
        self.train()

    def _downsample(self, in_channels: int, out_channels: int) -> Sequential:
        """A conv that halves the map, and a norm."""
        conv = build_conv_layer(
            self.units.conv_cfg, in_channels, out_channels, 3, stride=2, padding=1
        )
        return Sequential(OrderedDict(conv=conv, norm=LayerNorm2d(out_channels, eps=1e-6)))

    def stem_modules(self) -> list[nn.Module]:
        return [self.stem]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """``(N, in_channels, H, W)`` to the outputs of the stages in ``out_indices``."""
        outs = self.run_stages(self.stem(x))
        if self.gap_before_final_norm:
            outs = tuple(out.mean((2, 3)) for out in outs)
        norms = (getattr(self, f'norm_{i + 1}') for i in self.out_indices)
        return tuple(norm(out) for norm, out in zip(norms, outs, strict=True))
