"""RepVGG."""

from collections.abc import Sequence
from typing import Any

from mmengine.model import Sequential
from torch import Tensor, nn

from mmrep.registry import MODELS

from ..layers import MTSPPF
from .base import (
    INIT_CFG,
    ReparamBackbone,
    block_dilations,
    find_arch,
    require,
    require_one_per_stage,
    require_stages,
)
from .units import UnitConfig

_G2 = dict.fromkeys(range(2, 27, 2), 2)
_G4 = dict.fromkeys(range(2, 27, 2), 4)


def _arch(
    num_blocks: Sequence[int],
    width_factor: Sequence[float],
    group_layer_map: dict | None = None,
    se_cfg: dict | None = None,
    **options: Any,
) -> dict:
    arch = dict(num_blocks=num_blocks, width_factor=width_factor, se_cfg=se_cfg)
    return arch | dict(group_layer_map=group_layer_map, **options)


_A = (2, 4, 14, 1)
_B = (4, 6, 16, 1)
_B1, _B2, _B3 = (2, 2, 2, 4), (2.5, 2.5, 2.5, 5), (3, 3, 3, 5)


@MODELS.register_module()
class RepVGG(ReparamBackbone):
    """RepVGG: a stem and stages of 3x3 blocks that become one conv each.

    Arguments, defaults and state-dict keys are those of mmpretrain 1.2's ``RepVGG``, so
    its checkpoints load strictly.

    Source: `RepVGG: Making VGG-style ConvNets Great Again
    <https://arxiv.org/abs/2101.03697>`_, tables 2 and 3.

    Args:
        arch (str | dict): A name in ``arch_settings``, or a dict with the keys

            - **num_blocks** (Sequence[int]): Number of blocks of each stage.
            - **width_factor** (Sequence[float]): Stage ``i`` has
              ``base_channels * 2**i * width_factor[i]`` channels.
            - **group_layer_map** (dict[int, int], optional): Number of groups of each block
              with more than one, by its index; the first block after the stem is 1.
            - **se_cfg** (dict, optional): Config of the blocks' SE layer.
            - **se_position** (str, optional): ``'before_act'`` or ``'after_act'``.
              Default: ``'before_act'``.
            - **strides** (Sequence[int], optional): Default of the argument ``strides``.
            - **stem_channels** (int, optional): Upper limit of the stem's channels, which
              are at most the first stage's. Default: 64.
        in_channels (int): Number of channels of the image. Default: 3.
        base_channels (int): See ``arch``. Default: 64.
        out_indices (Sequence[int]): Stages, from 0, whose outputs are returned.
            Default: ``(3, )``.
        strides (Sequence[int], optional): Stride of the first block of each stage.
            Default: None, those of ``arch``, or 2 for each.
        dilations (Sequence[int | Sequence[int]], optional): Dilation of each stage, or of
            each of its blocks. Default: None, which means 1 for each.
        frozen_stages (int): Number of stages to freeze, with the stem. 0 freezes the stem
            alone. Default: -1, none.
        conv_cfg (dict, optional): Config of the convs. Default: None, ``nn.Conv2d``.
        norm_cfg (dict): Config of the norms. Default: ``dict(type='BN')``.
        act_cfg (dict): Config of the activations. Default: ``dict(type='ReLU')``.
        with_cp (bool): Recompute blocks in the backward pass to save memory.
            Default: False.
        deploy (bool): Build every block as one conv. Default: False.
        norm_eval (bool): Keep batch norms in eval mode while training. Default: False.
        add_ppf (bool): Apply the pyramid pooling of YOLOX-PAI to the last stage's output.
            Default: False.
        block_cfg (dict, optional): Config of the blocks: a type, and arguments for all of
            them; None for plain convs with norms.
            Default: ``dict(type='mmrep.RepVGGBlock')``.
        init_cfg (dict | list[dict], optional): Initialization. Default: Kaiming for
            convs, 1 for the weights of norms.

    Raises:
        ArchitectureError: If the arguments describe no network.
    """

    arch_settings = {
        'A0': _arch(_A, (0.75, 0.75, 0.75, 2.5)),
        'A1': _arch(_A, (1, 1, 1, 2.5)),
        'A2': _arch(_A, (1.5, 1.5, 1.5, 2.75)),
        'B0': _arch(_B, (1, 1, 1, 2.5)),
        'B1': _arch(_B, _B1),
        'B1g2': _arch(_B, _B1, _G2),
        'B1g4': _arch(_B, _B1, _G4),
        'B2': _arch(_B, _B2),
        'B2g2': _arch(_B, _B2, _G2),
        'B2g4': _arch(_B, _B2, _G4),
        'B3': _arch(_B, _B3),
        'B3g2': _arch(_B, _B3, _G2),
        'B3g4': _arch(_B, _B3, _G4),
        'D2se': _arch((8, 14, 24, 1), _B2, se_cfg=dict(ratio=16, divisor=1)),
        # The third stage, 24 blocks, is split so that its first half has an auxiliary head.
        'plus-L2pse': _arch(
            (8, 14, 12, 12, 1),
            (2.5, 2.5, 2.5, 1.25, 2.5),
            se_cfg=dict(ratio=4, divisor=1),
            se_position='after_act',
            strides=(2, 2, 2, 1, 2),
        ),
        'yolox-pai-small': _arch((3, 5, 7, 3), (1, 1, 1, 1), stem_channels=32),
    }

    def __init__(
        self,
        arch: str | dict,
        in_channels: int = 3,
        base_channels: int = 64,
        out_indices: Sequence[int] = (3,),
        strides: Sequence[int] | None = None,
        dilations: Sequence[int | Sequence[int]] | None = None,
        frozen_stages: int = -1,
        conv_cfg: dict | None = None,
        norm_cfg: dict = dict(type='BN'),
        act_cfg: dict = dict(type='ReLU'),
        with_cp: bool = False,
        deploy: bool = False,
        norm_eval: bool = False,
        add_ppf: bool = False,
        block_cfg: dict | None = dict(type='mmrep.RepVGGBlock'),
        init_cfg: dict | Sequence[dict] | None = INIT_CFG,
    ) -> None:
        super().__init__(frozen_stages, norm_eval, init_cfg)
        self.arch = arch = find_arch(
            arch,
            self.arch_settings,
            required=('num_blocks', 'width_factor'),
            optional=(
                *('group_layer_map', 'se_cfg', 'se_position', 'strides', 'stem_channels'),
            ),
        )
        num_stages = len(arch['num_blocks'])
        strides = strides or arch.get('strides') or (2,) * num_stages
        dilations = dilations or (1,) * num_stages
        require_one_per_stage(
            num_blocks=arch['num_blocks'],
            width_factor=arch['width_factor'],
            strides=strides,
            dilations=dilations,
        )
        require_stages(out_indices, num_stages)
        last = max(arch.get('group_layer_map') or {}, default=0)
        count = sum(arch['num_blocks'])
        require(last <= count, f'group_layer_map names block {last} of only {count}')
        every_dilation = block_dilations(dilations, arch['num_blocks'])
        self.in_channels = in_channels
        self.base_channels = base_channels
        self.out_indices = out_indices
        self.strides = strides
        self.dilations = dilations
        self.conv_cfg = conv_cfg
        self.norm_cfg = norm_cfg
        self.act_cfg = act_cfg
        self.with_cp = with_cp
        self.block_cfg = block_cfg
        self.units = UnitConfig(
            conv_cfg, norm_cfg, act_cfg, block_cfg, deploy, with_cp=with_cp
        )

        widths = [
            int(base_channels * 2**i * factor)
            for i, factor in enumerate(arch['width_factor'])
        ]
        channels = min(arch.get('stem_channels', 64), widths[0])
        self.stem_channels = channels
        self.stem = self._build_block(in_channels, channels, stride=2)
        self.stages = []
        index = 1
        for i, num_blocks in enumerate(arch['num_blocks']):
            stage = self._make_stage(
                channels, widths[i], strides[i], every_dilation[i], index
            )
            name = f'stage_{i + 1}'
            self.add_module(name, stage)
            self.stages.append(name)
            channels = widths[i]
            index += num_blocks
        ppf_cfg = dict(norm_cfg=norm_cfg, act_cfg=act_cfg)
        self.ppf = MTSPPF(channels, channels, **ppf_cfg) if add_ppf else nn.Identity()
        self.train()

    def _build_block(
        self, in_channels: int, out_channels: int, **geometry: Any
    ) -> nn.Module:
        return self.units.block(
            in_channels,
            out_channels,
            3,
            se_cfg=self.arch.get('se_cfg'),
            se_position=self.arch.get('se_position', 'before_act'),
            **geometry,
        )

    def _make_stage(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        dilations: Sequence[int],
        index: int,
    ) -> Sequential:
        layer_map = self.arch.get('group_layer_map') or {}
        return Sequential(
            *(
                self._build_block(
                    in_channels if j == 0 else out_channels,
                    out_channels,
                    stride=stride if j == 0 else 1,
                    padding=dilation,
                    dilation=dilation,
                    groups=layer_map.get(index + j, 1),
                )
                for j, dilation in enumerate(dilations)
            )
        )

    def stem_modules(self) -> list[nn.Module]:
        return [self.stem]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """``(N, in_channels, H, W)`` to the outputs of the stages in ``out_indices``."""
        outs = self.run_stages(self.stem(x))
        if len(self.stages) - 1 in self.out_indices:
            outs = (*outs[:-1], self.ppf(outs[-1]))
        return outs
