"""ResNet with blocks in the place of its convs, and DBB-ResNet."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.model import Sequential
from torch import Tensor, nn

from mmrep.registry import MODELS

from ..layers import build_activation
from .base import INIT_CFG, ReparamBackbone, require, require_stages
from .resnet_blocks import (
    BasicBlock,
    Bottleneck,
    ConvNormSequential,
    ResidualBlock,
    UnitOwner,
)
from .units import REPARAM_KERNELS, UnitConfig


@MODELS.register_module()
class ReparamResNet(ReparamBackbone, UnitOwner):
    """ResNet whose kxk units are blocks of ``block_cfg``.

    The arguments, their defaults and meaning are those of mmseg's ``ResNet``; with
    ``block_cfg=None`` so are the state-dict keys. In deploy form the norms of the plain
    convs are fused, too.

    Source: `Deep Residual Learning for Image Recognition
    <https://arxiv.org/abs/1512.03385>`_, table 1.

    Args:
        depth (int): 18, 34, 50, 101 or 152.
        in_channels (int): Number of channels of the image. Default: 3.
        stem_channels (int): Number of channels of the stem. Default: 64.
        base_channels (int): Number of channels inside the first stage's blocks.
            Default: 64.
        num_stages (int): Number of stages, 1 to 4. Default: 4.
        strides (Sequence[int]): Stride of the first block of each stage.
            Default: ``(1, 2, 2, 2)``.
        dilations (Sequence[int]): Dilation of each stage. Default: ``(1, 1, 1, 1)``.
        out_indices (Sequence[int]): Stages, from 0, whose outputs are returned.
            Default: ``(0, 1, 2, 3)``.
        style (str): Where a bottleneck's stride is: ``'pytorch'``, on the 3x3 unit, or
            ``'caffe'``, on the first 1x1. Default: ``'pytorch'``.
        deep_stem (bool): Three 3x3 units in the place of the 7x7 unit. Default: False.
        avg_down (bool): Average pooling in the place of the shortcut's stride.
            Default: False.
        frozen_stages (int): Number of stages to freeze, with the stem. 0 freezes the stem
            alone. Default: -1, none.
        conv_cfg (dict, optional): Config of the convs. Default: None, ``nn.Conv2d``.
        norm_cfg (dict): Config of the norms.
            Default: ``dict(type='BN', requires_grad=True)``.
        act_cfg (dict): Config of the activations. Default: ``dict(type='ReLU')``.
        norm_eval (bool): Keep batch norms in eval mode while training. Default: False.
        dcn (dict, optional): Config of a deformable conv for the bottlenecks.
            Default: None.
        stage_with_dcn (Sequence[bool]): Which stages have the deformable conv.
            Default: none.
        plugins (list[dict], optional): Plugins of the bottlenecks, with ``cfg``,
            ``position`` and, optionally, ``stages``, a flag for each stage.
            Default: None.
        multi_grid (Sequence[int], optional): Dilation of each block of the last stage.
            Default: None.
        contract_dilation (bool): Halve the first dilation of each stage. Default: False.
        with_cp (bool): Recompute blocks in the backward pass to save memory.
            Default: False.
        zero_init_residual (bool): Start every residual block as its shortcut, with a last
            norm whose scale is zero; not with ``init_cfg`` or ``pretrained``.
            Default: True.
        pretrained (str, optional): A checkpoint; deprecated, use ``init_cfg``.
            Default: None.
        deploy (bool): Build every unit as one conv. Default: False.
        block_cfg (dict, optional): Config of the block in the place of units. Default:
            None, a conv and a norm.
        reparam_kernels (Sequence[int]): Kernel sizes of the units that become this block.
            Default: ``(3, 5)``: the 7x7 stem stays plain, as in DBB, section 4.
        init_cfg (dict | list[dict], optional): Initialization. Default: None, which
            means Kaiming for convs and 1 for the weights of norms.

    Raises:
        ArchitectureError: If the arguments describe no network.
    """

    arch_settings = {
        18: (BasicBlock, (2, 2, 2, 2)),
        34: (BasicBlock, (3, 4, 6, 3)),
        50: (Bottleneck, (3, 4, 6, 3)),
        101: (Bottleneck, (3, 4, 23, 3)),
        152: (Bottleneck, (3, 8, 36, 3)),
    }

    def __init__(
        self,
        depth: int,
        in_channels: int = 3,
        stem_channels: int = 64,
        base_channels: int = 64,
        num_stages: int = 4,
        strides: Sequence[int] = (1, 2, 2, 2),
        dilations: Sequence[int] = (1, 1, 1, 1),
        out_indices: Sequence[int] = (0, 1, 2, 3),
        style: str = 'pytorch',
        deep_stem: bool = False,
        avg_down: bool = False,
        frozen_stages: int = -1,
        conv_cfg: dict | None = None,
        norm_cfg: dict = dict(type='BN', requires_grad=True),
        act_cfg: dict = dict(type='ReLU'),
        norm_eval: bool = False,
        dcn: dict | None = None,
        stage_with_dcn: Sequence[bool] = (False, False, False, False),
        plugins: list[dict] | None = None,
        multi_grid: Sequence[int] | None = None,
        contract_dilation: bool = False,
        with_cp: bool = False,
        zero_init_residual: bool = True,
        pretrained: str | None = None,
        deploy: bool = False,
        block_cfg: dict | None = None,
        reparam_kernels: Sequence[int] = REPARAM_KERNELS,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        self.norm_names: dict[int, str] = {}
        self._zero_init = zero_init_residual and init_cfg is None and pretrained is None
        super().__init__(frozen_stages, norm_eval, self._init_cfg(pretrained, init_cfg))
        if depth not in self.arch_settings:
            raise KeyError(
                f'depth {depth} is unknown; choose from {tuple(self.arch_settings)}'
            )
        self.block, stage_blocks = self.arch_settings[depth]
        require(1 <= num_stages <= 4, f'num_stages must be 1 to 4, not {num_stages}')
        require(
            len(strides) == len(dilations) == num_stages,
            f'strides {tuple(strides)} and dilations {tuple(dilations)} must have an '
            f'entry for each of the {num_stages} stages',
        )
        require_stages(out_indices, num_stages)
        require(
            dcn is None or len(stage_with_dcn) == num_stages,
            f'stage_with_dcn={tuple(stage_with_dcn)} of {num_stages} stages: give a flag '
            'for each stage',
        )
        self.depth = depth
        self.in_channels = in_channels
        self.stem_channels = stem_channels
        self.base_channels = base_channels
        self.num_stages = num_stages
        self.strides = strides
        self.dilations = dilations
        self.out_indices = out_indices
        self.style = style
        self.deep_stem = deep_stem
        self.avg_down = avg_down
        self.conv_cfg = conv_cfg
        self.norm_cfg = norm_cfg
        self.act_cfg = act_cfg
        self.with_cp = with_cp
        self.dcn = dcn
        self.stage_with_dcn = stage_with_dcn
        self.plugins = plugins
        self.multi_grid = multi_grid
        self.contract_dilation = contract_dilation
        self.zero_init_residual = zero_init_residual
        self.block_cfg = block_cfg
        self.reparam_kernels = reparam_kernels
        self.stage_blocks = stage_blocks[:num_stages]

        units = UnitConfig(conv_cfg, norm_cfg, act_cfg, block_cfg, deploy, reparam_kernels)
        self._make_stem(units)
        self.res_layers = []
        inplanes = stem_channels
        for i in range(num_stages):
            planes = base_channels * 2**i
            name = f'layer{i + 1}'
            self.add_module(name, self._make_stage(i, inplanes, planes, units))
            self.res_layers.append(name)
            inplanes = planes * self.block.expansion
        self.stages = self.res_layers
        self.feat_dim = inplanes
        if deploy:
            for module in self.modules():
                if hasattr(module, 'fuse_plain_units'):
                    module.fuse_plain_units()
        self.train()

    def _init_cfg(
        self, pretrained: str | None, init_cfg: dict | list[dict] | None
    ) -> dict | list[dict]:
        require(
            not (pretrained and init_cfg), 'give either init_cfg or pretrained, not both'
        )
        if pretrained is None:
            return init_cfg or INIT_CFG
        if not isinstance(pretrained, str):
            raise TypeError(f'pretrained must be a str or None, not {pretrained!r}')
        warnings.warn(
            "pretrained is deprecated: use init_cfg=dict(type='Pretrained', "
            f'checkpoint={pretrained!r})',
            DeprecationWarning,
            stacklevel=3,
        )
        return dict(type='Pretrained', checkpoint=pretrained)

    def _make_stem(self, units: UnitConfig) -> None:
        channels, act_cfg = self.stem_channels, self.act_cfg
        if self.deep_stem:
            half = channels // 2
            layers = []
            for ins, outs, stride in (
                (self.in_channels, half, 2),
                (half, half, 1),
                (half, channels, 1),
            ):
                conv, _, norm = units.build_unit(ins, outs, 3, stride=stride, padding=1)
                # A block has its norms inside; an identity keeps mmseg's indices.
                layers += [conv, norm or nn.Identity(), build_activation(act_cfg)]
            self.stem = ConvNormSequential(*layers)
        else:
            self.add_unit(1, units, self.in_channels, channels, 7, stride=2, padding=3)
            self.relu = build_activation(act_cfg)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)

    def _make_stage(
        self, index: int, inplanes: int, planes: int, units: UnitConfig
    ) -> Sequential:
        stride, dilation = self.strides[index], self.dilations[index]
        last = index == self.num_stages - 1
        num_blocks = self.stage_blocks[index]
        if self.multi_grid is not None and last:
            dilations = list(self.multi_grid)
            require(
                len(dilations) == num_blocks,
                f'multi_grid={tuple(dilations)} of a stage of {num_blocks} blocks: give a '
                'dilation for each block',
            )
        else:
            contracted = dilation > 1 and self.contract_dilation
            first = dilation // 2 if contracted else dilation
            dilations = [first] + [dilation] * (num_blocks - 1)
        outplanes = planes * self.block.expansion
        common = dict(
            style=self.style,
            with_cp=self.with_cp,
            dcn=self.dcn if self.dcn and self.stage_with_dcn[index] else None,
            plugins=self.make_stage_plugins(self.plugins, index),
        )
        blocks = []
        for j in range(num_blocks):
            first = j == 0
            downsample = None
            if first and (stride != 1 or inplanes != outplanes):
                downsample = self._make_downsample(inplanes, outplanes, stride, units)
            blocks.append(
                self.block(
                    inplanes if first else outplanes,
                    planes,
                    units,
                    stride=stride if first else 1,
                    dilation=dilations[j],
                    downsample=downsample,
                    **common,
                )
            )
        return Sequential(*blocks)

    def _make_downsample(
        self, inplanes: int, outplanes: int, stride: int, units: UnitConfig
    ) -> ConvNormSequential:
        layers = []
        if self.avg_down:
            layers.append(
                nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)
            )
            stride = 1
        conv, _, norm = units.build_unit(inplanes, outplanes, 1, stride=stride)
        return ConvNormSequential(*layers, conv, norm)

    def make_stage_plugins(
        self, plugins: list[dict] | None, stage_idx: int
    ) -> list[dict] | None:
        """The plugins of a stage, or ``None`` where the network has none."""
        if plugins is None:
            return None
        chosen = []
        for plugin in plugins:
            stages = plugin.get('stages')
            require(
                stages is None or len(stages) == self.num_stages,
                f'plugin stages {stages} of {self.num_stages} stages: give a flag for each '
                'stage',
            )
            if stages is None or stages[stage_idx]:
                chosen.append({k: v for k, v in plugin.items() if k != 'stages'})
        return chosen

    def init_weights(self) -> None:
        """Initialize by ``init_cfg``, then apply ``zero_init_residual``."""
        super().init_weights()
        if not self._zero_init:
            return
        with torch.no_grad():
            for block in self.modules():
                if isinstance(block, ResidualBlock):
                    for norm in block.last_norms():
                        if norm.weight is not None:
                            norm.weight.zero_()

    def stem_modules(self) -> list[nn.Module]:
        stem = [self.stem] if self.deep_stem else [self.conv1, self.norm1]
        return [module for module in stem if module is not None]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """``(N, in_channels, H, W)`` to the outputs of the stages in ``out_indices``."""
        x = self.stem(x) if self.deep_stem else self.relu(self.unit(1, x))
        return self.run_stages(self.maxpool(x))


@MODELS.register_module()
class DBBResNet(ReparamResNet):
    """ResNet with a Diverse Branch Block in the place of every kxk unit with k > 1.

    Source: `Diverse Branch Block: Building a Convolution as an Inception-like Unit
    <https://arxiv.org/abs/2103.13425>`_, section 4.

    Args:
        depth (int): 18, 34, 50, 101 or 152.
        block_cfg (dict): Config of the blocks.
            Default: ``dict(type='mmrep.DiverseBranchBlock')``.
        **kwargs: See :class:`ReparamResNet`.
    """

    def __init__(
        self,
        depth: int,
        block_cfg: dict | None = dict(type='mmrep.DiverseBranchBlock'),
        **kwargs: Any,
    ) -> None:
        super().__init__(depth, block_cfg=block_cfg, **kwargs)


@MODELS.register_module()
class DBBResNetV1c(DBBResNet):
    """:class:`DBBResNet` with the deep stem.

    Source: `Bag of Tricks <https://arxiv.org/abs/1812.01187>`_, figure 2b.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(deep_stem=True, avg_down=False, **kwargs)


@MODELS.register_module()
class DBBResNetV1d(DBBResNet):
    """:class:`DBBResNet` with the deep stem and average pooling in the shortcuts.

    Source: `Bag of Tricks <https://arxiv.org/abs/1812.01187>`_, figure 2c.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(deep_stem=True, avg_down=True, **kwargs)
