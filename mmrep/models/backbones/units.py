"""How a body builds its units: a conv, a norm and, maybe, an activation."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mmcv.cnn import build_conv_layer, build_norm_layer
from torch import nn

from mmrep.registry import MODELS

#: Kernel sizes that DBB replaces: 1x1 and the large ones of a stem stay plain (section 4).
REPARAM_KERNELS = (3, 5)


@dataclass(frozen=True)
class UnitConfig:
    """How a body builds its units: a conv, a norm and, maybe, an activation.

    Args:
        conv_cfg, norm_cfg, act_cfg (dict, optional): Configs of a unit's layers.
        block_cfg (dict, optional): Config of the block in the place of a unit.
        deploy (bool): Whether blocks are built as single convs.
        reparam_kernels (Sequence[int]): Kernel sizes of the units that become this block.
        with_cp (bool): Whether blocks are recomputed in the backward pass.
    """

    conv_cfg: dict | None
    norm_cfg: dict
    act_cfg: dict | None
    block_cfg: dict | None
    deploy: bool
    reparam_kernels: Sequence[int] = REPARAM_KERNELS
    with_cp: bool = False

    def block(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        optional: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> nn.Module:
        """Build a unit as one block: the configured one, or a plain ``ConvNormBlock``.

        Args:
            in_channels, out_channels, kernel_size (int): The conv's.
            optional (Mapping, optional): Arguments that the configured block is given only
                if its type has them. Default: None.
            **options: Stride, padding, dilation, groups and other arguments of both blocks,
                as ``se_cfg``.
        """
        cfg = dict(
            in_channels=in_channels,
            out_channels=out_channels,
            kernel_size=kernel_size,
            conv_cfg=self.conv_cfg,
            norm_cfg=self.norm_cfg,
            act_cfg=self.act_cfg,
            deploy=self.deploy,
            with_cp=self.with_cp,
            **options,
        )
        if self.block_cfg is None or kernel_size not in self.reparam_kernels:
            return MODELS.build({**cfg, 'type': 'mmrep.ConvNormBlock'})
        given = (optional or {}).items()
        cfg |= {name: value for name, value in given if self._takes(name)}
        return MODELS.build({**cfg, **self.block_cfg})

    def _takes(self, argument: str) -> bool:
        """Whether the configured type of block has an argument."""
        kind = self.block_cfg.get('type')
        kind = MODELS.get(kind) if isinstance(kind, str) else kind
        for base in getattr(kind, '__mro__', ()):
            parameters = inspect.signature(base.__init__).parameters
            if argument in parameters:
                return True
            if all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
                # Without **kwargs it passes no other argument on to its base.
                return False
        return False

    def build_unit(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        postfix: int | str = '',
        conv_cfg: dict | None = None,
        **geometry: Any,
    ) -> tuple[nn.Module, str, nn.Module | None]:
        """Build a unit without activation: its conv, its norm's name and its norm.

        A block that takes the place of both is returned as the conv, with ``None`` as norm.

        Args:
            in_channels, out_channels, kernel_size (int): The conv's.
            postfix (int | str): What the norm's name ends with. Default: ''.
            conv_cfg (dict, optional): Config of a conv for this unit alone; no block
                replaces it. Default: None.
            **geometry: Stride, padding, dilation.
        """
        replaced = self.block_cfg is not None and kernel_size in self.reparam_kernels
        if replaced and conv_cfg is None:
            inside = replace(self, act_cfg=None, with_cp=False)
            block = inside.block(in_channels, out_channels, kernel_size, **geometry)
            return block, '', None
        conv = build_conv_layer(
            conv_cfg or self.conv_cfg,
            in_channels,
            out_channels,
            kernel_size,
            bias=False,
            **geometry,
        )
        return conv, *build_norm_layer(self.norm_cfg, out_channels, postfix)
