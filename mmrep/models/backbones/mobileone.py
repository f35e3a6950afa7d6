"""MobileOne."""

from collections.abc import Sequence

from mmengine.model import Sequential
from torch import Tensor, nn

from mmrep.registry import MODELS

from .base import (
    INIT_CFG,
    ReparamBackbone,
    block_dilations,
    find_arch,
    require,
    require_one_per_stage,
    stage_indices,
)
from .units import UnitConfig


def _arch(
    width_factor: Sequence[float],
    num_conv_branches: int = 1,
    num_se_blocks: Sequence[int] = (0, 0, 0, 0),
) -> dict:
    return dict(
        num_blocks=(2, 8, 10, 1),
        width_factor=width_factor,
        num_conv_branches=(num_conv_branches,) * 4,
        num_se_blocks=num_se_blocks,
    )


@MODELS.register_module()
class MobileOne(ReparamBackbone):
    """MobileOne: stages of 3x3 depthwise and 1x1 blocks that become one conv each.

    Arguments, defaults and state-dict keys are those of mmpretrain 1.2's ``MobileOne``, so
    its checkpoints load strictly.

    Source: `MobileOne: An Improved One millisecond Mobile Backbone
    <https://arxiv.org/abs/2206.04040>`_, tables 2 and 3.

    Args:
        arch (str | dict): A name in ``arch_settings``, or a dict with the keys

            - **num_blocks** (Sequence[int]): Number of pairs of a depthwise and a 1x1 block
              in each stage.
            - **width_factor** (Sequence[float]): Stage ``i`` has
              ``base_channels * 2**i * width_factor[i]`` channels.
            - **num_conv_branches** (Sequence[int]): ``num_convs`` of the blocks of each
              stage; the stem has one.
            - **num_se_blocks** (Sequence[int]): Number of pairs with SE layers in each
              stage; they are its last ones.
        in_channels (int): Number of channels of the image. Default: 3.
        out_indices (Sequence[int] | int): Stages, from 0, whose outputs are returned;
            negative ones count from the end. Default: ``(3, )``.
        frozen_stages (int): Number of stages to freeze, with the stem. 0 freezes the stem
            alone. Default: -1, none.
        conv_cfg (dict, optional): Config of the convs. Default: None, ``nn.Conv2d``.
        norm_cfg (dict): Config of the norms. Default: ``dict(type='BN')``.
        act_cfg (dict): Config of the activations. Default: ``dict(type='ReLU')``.
        se_cfg (dict): Config of the SE layers. Default: ``dict(ratio=16)``.
        deploy (bool): Build every block as one conv. Default: False.
        norm_eval (bool): Keep batch norms in eval mode while training. Default: False.
        init_cfg (dict | list[dict], optional): Initialization. Default: Kaiming for
            convs, 1 for the weights of norms.
        base_channels (int): See ``arch``; upper limit of the stem's channels. Default: 64.
        strides (Sequence[int], optional): Stride of the first pair of each stage.
            Default: None, which means 2 for each.
        dilations (Sequence[int | Sequence[int]], optional): Dilation of the depthwise
            blocks of each stage, or of each of its pairs. Default: None, which means 1.
        with_cp (bool): Recompute blocks in the backward pass to save memory.
            Default: False.
        block_cfg (dict, optional): Config of the blocks: a type, and arguments for all of
            them; ``num_convs`` comes from ``arch`` if the type has this argument. None
            for plain convs with norms. Default: ``dict(type='mmrep.MobileOneBlock')``.
        reparam_kernels (Sequence[int]): Kernel sizes of the units that become this block;
            the others are plain. Default: ``(1, 3)``.

    Raises:
        ArchitectureError: If the arguments describe no network.
    """

    arch_settings = {
        's0': _arch((0.75, 1, 1, 2), num_conv_branches=4),
        's1': _arch((1.5, 1.5, 2, 2.5)),
        's2': _arch((1.5, 2, 2.5, 4)),
        's3': _arch((2, 2.5, 3, 4)),
        's4': _arch((3, 3.5, 3.5, 4), num_se_blocks=(0, 0, 5, 1)),
    }

    def __init__(
        self,
        arch: str | dict,
        in_channels: int = 3,
        out_indices: Sequence[int] | int = (3,),
        frozen_stages: int = -1,
        conv_cfg: dict | None = None,
        norm_cfg: dict = dict(type='BN'),
        act_cfg: dict = dict(type='ReLU'),
        se_cfg: dict = dict(ratio=16),
        deploy: bool = False,
        norm_eval: bool = False,
        init_cfg: dict | Sequence[dict] | None = INIT_CFG,
        base_channels: int = 64,
        strides: Sequence[int] | None = None,
        dilations: Sequence[int | Sequence[int]] | None = None,
        with_cp: bool = False,
        block_cfg: dict | None = dict(type='mmrep.MobileOneBlock'),
        reparam_kernels: Sequence[int] = (1, 3),
    ) -> None:
        super().__init__(frozen_stages, norm_eval, init_cfg)
        self.arch = arch = find_arch(
            arch,
            self.arch_settings,
            ('num_blocks', 'width_factor', 'num_conv_branches', 'num_se_blocks'),
        )
        num_stages = len(arch['num_blocks'])
        strides = strides or (2,) * num_stages
        dilations = dilations or (1,) * num_stages
        require_one_per_stage(**arch, strides=strides, dilations=dilations)
        indices = stage_indices(out_indices, num_stages)
        for pairs, with_se in zip(arch['num_blocks'], arch['num_se_blocks'], strict=True):
            require(
                with_se <= pairs,
                f'num_se_blocks asks for {with_se} SE blocks in a stage of {pairs} blocks',
            )
        every_dilation = block_dilations(dilations, arch['num_blocks'])
        self.in_channels = in_channels
        self.out_indices = indices
        self.se_cfg = se_cfg
        self.units = UnitConfig(
            conv_cfg, norm_cfg, act_cfg, block_cfg, deploy, reparam_kernels, with_cp
        )

        widths = [
            int(base_channels * 2**i * factor)
            for i, factor in enumerate(arch['width_factor'])
        ]
        channels = min(base_channels, widths[0])
        self.stage0 = self.units.block(
            in_channels, channels, 3, optional=dict(num_convs=1), stride=2
        )
        self.stages = [f'stage{i + 1}' for i in range(num_stages)]
        for i, name in enumerate(self.stages):
            stage = self._make_stage(i, channels, widths[i], strides[i], every_dilation[i])
            self.add_module(name, stage)
            channels = widths[i]
        self.train()

    def _make_stage(
        self,
        index: int,
        in_channels: int,
        out_channels: int,
        stride: int,
        dilations: Sequence[int],
    ) -> Sequential:
        num_convs = self.arch['num_conv_branches'][index]
        first_with_se = len(dilations) - self.arch['num_se_blocks'][index]
        blocks = []
        for j, dilation in enumerate(dilations):
            channels = out_channels if j else in_channels
            se_cfg = self.se_cfg if j >= first_with_se else None
            depthwise = dict(
                stride=1 if j else stride,
                padding=dilation,
                dilation=dilation,
                groups=channels,
            )
            for outs, kernel_size, geometry in (
                (channels, 3, depthwise),
                (out_channels, 1, {}),
            ):
                blocks.append(
                    self.units.block(
                        channels,
                        outs,
                        kernel_size,
                        optional=dict(num_convs=num_convs),
                        se_cfg=se_cfg,
                        **geometry,
                    )
                )
        return Sequential(*blocks)

    def stem_modules(self) -> list[nn.Module]:
        return [self.stage0]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """``(N, in_channels, H, W)`` to the outputs of the stages in ``out_indices``."""
        return self.run_stages(self.stage0(x))
