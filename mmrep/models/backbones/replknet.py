"""RepLKNet."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from mmcv.cnn import build_activation_layer, build_conv_layer, build_norm_layer
from mmcv.cnn.bricks import DropPath
from mmengine.model import BaseModule, ModuleList, Sequential
from torch import Tensor, nn

from mmrep.registry import MODELS

from ..layers import run_block
from .base import (
    INIT_CFG,
    ReparamBackbone,
    find_arch,
    require,
    require_one_per_stage,
    stage_indices,
)
from .units import UnitConfig


def _conv_norm(
    units: UnitConfig,
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    act: bool = True,
    **geometry: Any,
) -> Sequential:
    """A conv, its norm and, with ``act``, an activation, by mmpretrain's names."""
    layers = OrderedDict(
        conv=build_conv_layer(
            units.conv_cfg,
            in_channels,
            out_channels,
            kernel_size,
            padding=kernel_size // 2,
            bias=False,
            **geometry,
        ),
        bn=build_norm_layer(units.norm_cfg, out_channels)[1],
    )
    if act:
        layers['nonlinear'] = build_activation_layer(units.act_cfg)
    return Sequential(layers)


class _Residual(BaseModule):
    """``y = x + drop_path(residual(x))``."""

    def __init__(self, drop_path: float, with_cp: bool) -> None:
        super().__init__()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.with_cp = with_cp

    def forward(self, x: Tensor) -> Tensor:
        """``(N, channels, H, W)`` to the same shape."""
        return x + self.drop_path(run_block(self, self.residual, x, self.with_cp))

    def residual(self, x: Tensor) -> Tensor:
        """The branch that is added to the input."""
        raise NotImplementedError


class RepLKBlock(_Residual):
    """``y = x + pw2(large_kernel(pw1(prelkb_bn(x))))``.

    ``pw1`` and ``pw2`` are 1x1 convs with norms, ``large_kernel`` is a depthwise block. An
    activation follows ``pw1`` and ``large_kernel``.

    Source: `Scaling Up Your Kernels to 31x31 <https://arxiv.org/abs/2203.06717>`_, section
    4.1 and figure 4.

    Args:
        channels (int): Number of input and output channels.
        dw_channels (int): Number of channels of the depthwise block.
        kernel_size (int): Rows and columns of the depthwise kernel.
        units (UnitConfig): How units are built.
        small_kernel (int, optional): Rows and columns of the small kernel beside it; None
            for none.
        dilation (int): Dilation of both kernels. Default: 1.
        drop_path (float): Probability that an image skips the block in training.
            Default: 0.
    """

    def __init__(
        self,
        channels: int,
        dw_channels: int,
        kernel_size: int,
        units: UnitConfig,
        small_kernel: int | None,
        dilation: int = 1,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(drop_path, units.with_cp)
        self.pw1 = _conv_norm(units, channels, dw_channels, 1)
        self.pw2 = _conv_norm(units, dw_channels, channels, 1, act=False)
        self.large_kernel = replace(units, with_cp=False).block(
            dw_channels,
            dw_channels,
            kernel_size,
            optional=dict(small_kernel=small_kernel),
            dilation=dilation,
            groups=dw_channels,
        )
        self.prelkb_bn = build_norm_layer(units.norm_cfg, channels)[1]

    def residual(self, x: Tensor) -> Tensor:
        return self.pw2(self.large_kernel(self.pw1(self.prelkb_bn(x))))


class ConvFFN(_Residual):
    """``y = x + pw2(act(pw1(preffn_bn(x))))``: two 1x1 convs with norms.

    Source: `Scaling Up Your Kernels to 31x31 <https://arxiv.org/abs/2203.06717>`_, section
    4.1 and figure 4.

    Args:
        channels (int): Number of input and output channels.
        hidden_channels (int): Number of channels between the convs.
        units (UnitConfig): How units are built; its ``act_cfg`` is that of ``act``.
        drop_path (float): Probability that an image skips the block in training.
            Default: 0.
    """

    def __init__(
        self,
        channels: int,
        hidden_channels: int,
        units: UnitConfig,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(drop_path, units.with_cp)
        self.preffn_bn = build_norm_layer(units.norm_cfg, channels)[1]
        self.pw1 = _conv_norm(units, channels, hidden_channels, 1)
        self.pw2 = _conv_norm(units, hidden_channels, channels, 1, act=False)

    def residual(self, x: Tensor) -> Tensor:
        return self.pw2(self.pw1(self.preffn_bn(x)))


class RepLKStage(BaseModule):
    """A sequence of blocks, and a norm that the backbone applies to its output.

    Args:
        blocks (list[nn.Module]): The blocks.
        norm (nn.Module): The norm; ``forward`` does not apply it.
    """

    def __init__(self, blocks: list[nn.Module], norm: nn.Module) -> None:
        super().__init__()
        self.blocks = ModuleList(blocks)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """``(N, channels, H, W)`` to the same shape, without the norm."""
        for block in self.blocks:
            x = block(x)
        return x


@MODELS.register_module()
class RepLKNet(ReparamBackbone):
    """RepLKNet: stages of depthwise convs of up to 31x31 between 1x1 convs.

    State-dict keys and defaults are those of mmpretrain 1.2's ``RepLKNet``, so that its
    checkpoints load strictly. The arguments ``strides``, ``dilations``, ``conv_cfg``,
    ``norm_cfg`` and ``act_cfg``, which mmpretrain's ignores, take effect here.

    Source: `Scaling Up Your Kernels to 31x31: Revisiting Large Kernel Design in CNNs
    <https://arxiv.org/abs/2203.06717>`_, section 4.1 and table 5.

    Args:
        arch (str | dict): A name in ``arch_settings``, or a dict with the keys

            - **large_kernel_sizes** (Sequence[int]): Kernel size of each stage.
            - **layers** (Sequence[int]): Number of pairs of a ``RepLKBlock`` and a
              ``ConvFFN`` of each stage.
            - **channels** (Sequence[int]): Number of channels of each stage.
            - **small_kernel** (int, optional): Size of the small kernel beside every large
              one; None for none.
            - **dw_ratio** (float): Ratio of the depthwise convs' channels to the stage's.
        in_channels (int): Number of channels of the image. Default: 3.
        ffn_ratio (float): Ratio of the channels inside a ``ConvFFN`` to the stage's.
            Default: 4.
        out_indices (Sequence[int] | int): Stages, from 0, whose outputs are returned, each
            after a norm of its own; negative ones count from the end. Default: ``(3, )``.
        strides (Sequence[int]): Stride of the last conv before each stage. The first conv
            of the stem adds another stride of 2. Default: ``(2, 2, 2, 2)``.
        dilations (Sequence[int]): Dilation of the large kernels of each stage.
            Default: ``(1, 1, 1, 1)``.
        frozen_stages (int): Number of stages to freeze, with the stem. 0 freezes the stem
            alone. Default: -1, none.
        conv_cfg (dict, optional): Config of the convs. Default: None, ``nn.Conv2d``.
        norm_cfg (dict): Config of the norms. Default: ``dict(type='BN')``.
        act_cfg (dict): Config of the activations outside the ``ConvFFN``.
            Default: ``dict(type='ReLU')``.
        ffn_act_cfg (dict): Config of the activations in the ``ConvFFN``.
            Default: ``dict(type='GELU')``.
        with_cp (bool): Recompute blocks in the backward pass to save memory.
            Default: False.
        drop_path_rate (float): Probability that an image skips the blocks of the last pair
            in training; from the first pair on it rises linearly from 0. Default: 0.3.
        deploy (bool): Build every large kernel as one conv. Default: False.
        norm_eval (bool): Keep batch norms in eval mode while training. Default: False.
        block_cfg (dict, optional): Config of the depthwise blocks: a type, and arguments
            for all of them; ``small_kernel`` comes from ``arch`` if the type has this
            argument. None for plain convs with norms.
            Default: ``dict(type='mmrep.LargeKernelBlock')``.
        init_cfg (dict | list[dict], optional): Initialization. Default: Kaiming for
            convs, 1 for the weights of norms.

    Raises:
        ArchitectureError: If the arguments describe no network.
    """

    arch_settings = {
        '31B': dict(
            large_kernel_sizes=(31, 29, 27, 13),
            layers=(2, 2, 18, 2),
            channels=(128, 256, 512, 1024),
            small_kernel=5,
            dw_ratio=1,
        ),
        '31L': dict(
            large_kernel_sizes=(31, 29, 27, 13),
            layers=(2, 2, 18, 2),
            channels=(192, 384, 768, 1536),
            small_kernel=5,
            dw_ratio=1,
        ),
        'XL': dict(
            large_kernel_sizes=(27, 27, 27, 13),
            layers=(2, 2, 18, 2),
            channels=(256, 512, 1024, 2048),
            small_kernel=None,
            dw_ratio=1.5,
        ),
    }

    def __init__(
        self,
        arch: str | dict,
        in_channels: int = 3,
        ffn_ratio: float = 4,
        out_indices: Sequence[int] | int = (3,),
        strides: Sequence[int] = (2, 2, 2, 2),
        dilations: Sequence[int] = (1, 1, 1, 1),
        frozen_stages: int = -1,
        conv_cfg: dict | None = None,
        norm_cfg: dict = dict(type='BN'),
        act_cfg: dict = dict(type='ReLU'),
        ffn_act_cfg: dict = dict(type='GELU'),
        with_cp: bool = False,
        drop_path_rate: float = 0.3,
        deploy: bool = False,
        norm_eval: bool = False,
        block_cfg: dict | None = dict(type='mmrep.LargeKernelBlock'),
        init_cfg: dict | Sequence[dict] | None = INIT_CFG,
    ) -> None:
        super().__init__(frozen_stages, norm_eval, init_cfg)
        per_stage = ('large_kernel_sizes', 'layers', 'channels')
        keys = (*per_stage, 'small_kernel', 'dw_ratio')
        self.arch = arch = find_arch(arch, self.arch_settings, keys)
        require_one_per_stage(
            **{key: arch[key] for key in per_stage}, strides=strides, dilations=dilations
        )
        channels, sizes = arch['channels'], arch['large_kernel_sizes']
        require(
            all(isinstance(size, int) and size % 2 for size in sizes),
            f'large_kernel_sizes={sizes} must be odd integers',
        )
        small = arch['small_kernel']
        require(
            small is None or (small % 2 and small <= min(sizes)),
            f'small_kernel={small} must be odd and at most the smallest of {sizes}',
        )
        self.in_channels = in_channels
        self.out_indices = stage_indices(out_indices, len(channels))
        self.units = UnitConfig(
            conv_cfg, norm_cfg, act_cfg, block_cfg, deploy, sizes, with_cp
        )

        self.stem = self._build_stem(strides[0])
        rates = iter(np.linspace(0, drop_path_rate, sum(arch['layers'])).tolist())
        self.stages, self.transitions = ModuleList(), ModuleList()
        ffn_units = replace(self.units, act_cfg=ffn_act_cfg)
        for i, width in enumerate(channels):
            if i:
                narrow = _conv_norm(self.units, channels[i - 1], width, 1)
                down = dict(stride=strides[i], groups=width)
                self.transitions.append(
                    Sequential(narrow, _conv_norm(self.units, width, width, 3, **down))
                )
            blocks = []
            for _ in range(arch['layers'][i]):
                rate = next(rates)
                large = RepLKBlock(
                    width,
                    int(width * arch['dw_ratio']),
                    sizes[i],
                    self.units,
                    small,
                    dilations[i],
                    rate,
                )
                blocks += [large, ConvFFN(width, int(width * ffn_ratio), ffn_units, rate)]
            is_output = i in self.out_indices
            norm = build_norm_layer(norm_cfg, width)[1] if is_output else nn.Identity()
            self.stages.append(RepLKStage(blocks, norm))
        self.train()

    def _build_stem(self, stride: int) -> ModuleList:
        width = self.arch['channels'][0]
        return ModuleList(
            [
                _conv_norm(self.units, self.in_channels, width, 3, stride=2),
                _conv_norm(self.units, width, width, 3, groups=width),
                _conv_norm(self.units, width, width, 1),
                _conv_norm(self.units, width, width, 3, stride=stride, groups=width),
            ]
        )

    def stem_modules(self) -> list[nn.Module]:
        return [self.stem]

    def stage_modules(self, index: int) -> list[nn.Module]:
        before = [self.transitions[index - 1]] if index else []
        return [*before, self.stages[index]]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """``(N, in_channels, H, W)`` to the outputs of the stages in ``out_indices``."""
        for layer in self.stem:
            x = layer(x)
        outs = []
        for i, stage in enumerate(self.stages):
            if i:
                x = self.transitions[i - 1](x)
            x = stage(x)
            if i in self.out_indices:
                outs.append(stage.norm(x))
        return tuple(outs)
