"""The residual blocks of ResNet, whose convs are chosen by a config."""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from mmcv.cnn import build_plugin_layer
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmrep.reparam import apply_conv_norm, fuse_conv_norm

from ..layers import build_activation, run_block
from .base import require
from .units import UnitConfig


class UnitOwner(BaseModule):
    """A module with units: ``conv{i}`` and, unless it is a block, its norm ``bn{i}``."""

    #: Whether a plain conv and its norm compute as one conv; see
    #: :func:`mmrep.reparam.one_conv_kernel`.
    one_conv: bool | int | str = 'auto'

    def __init__(self, init_cfg: dict | list[dict] | None = None) -> None:
        super().__init__(init_cfg)
        self.norm_names: dict[int, str] = {}

    def add_unit(self, index: int, config: UnitConfig, *args: Any, **kwargs: Any) -> None:
        """Build unit ``index``; see :meth:`UnitConfig.build_unit` for the arguments."""
        conv, norm_name, norm = config.build_unit(*args, postfix=index, **kwargs)
        self.add_module(f'conv{index}', conv)
        if norm is not None:
            self.norm_names[index] = norm_name
            self.add_module(norm_name, norm)

    def norm(self, index: int) -> nn.Module | None:
        """The norm of a unit; ``None`` if the unit is a block or a fused conv."""
        name = self.norm_names.get(index)
        return None if name is None else getattr(self, name)

    def unit(self, index: int, x: Tensor) -> Tensor:
        """Apply a unit."""
        conv, norm = getattr(self, f'conv{index}'), self.norm(index)
        return conv(x) if norm is None else apply_conv_norm(conv, norm, x, self.one_conv)

    def plain_units(self) -> dict[str, list[nn.Module]]:
        """The units that are not blocks: a conv and, unless they are fused, its norm."""
        units = {}
        for name, conv in self.named_children():
            if re.fullmatch(r'conv\d+', name) and isinstance(conv, nn.Conv2d):
                norm = self.norm(int(name.removeprefix('conv')))
                units[name] = [conv] if norm is None else [conv, norm]
        return units

    def fuse_plain_units(self) -> None:
        """Turn each conv and norm that equal one conv into it."""
        for index, name in list(self.norm_names.items()):
            fused = fuse_conv_norm(getattr(self, f'conv{index}'), getattr(self, name))
            if fused is not None:
                setattr(self, f'conv{index}', fused)
                delattr(self, name)
                del self.norm_names[index]

    @property
    def norm1(self) -> nn.Module | None:
        """The norm of the first unit."""
        return self.norm(1)


class ConvNormSequential(nn.Sequential):
    """A sequence of layers, in which a norm follows every plain conv."""

    def plain_units(self) -> dict[str, list[nn.Module]]:
        """Each conv and the layer after it: its norm or, once fused, an identity."""
        return {
            str(index): [conv, after]
            for index, (conv, after) in enumerate(pairwise(self))
            if isinstance(conv, nn.Conv2d)
        }

    def fuse_plain_units(self) -> None:
        """Turn each conv and norm that equal one conv into it."""
        for index in range(1, len(self)):
            fused = fuse_conv_norm(self[index - 1], self[index])
            if fused is not None:
                self[index - 1] = fused
                self[index] = nn.Identity().train(self[index].training)


class ResidualBlock(UnitOwner):
    """The base of the residual blocks: ``y = act(body(x) + shortcut(x))``.

    Args:
        inplanes (int): Number of input channels.
        planes (int): Number of channels inside.
        units (UnitConfig): What the units are.
        stride (int): Stride of the block. Default: 1.
        dilation (int): Dilation of the (first) 3x3 unit. Default: 1.
        downsample (nn.Module, optional): The shortcut. Default: None, the identity.
        with_cp (bool): Recompute in the backward pass. Default: False.
    """

    expansion = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        units: UnitConfig,
        stride: int = 1,
        dilation: int = 1,
        downsample: nn.Module | None = None,
        with_cp: bool = False,
    ) -> None:
        super().__init__()
        self.inplanes = inplanes
        self.planes = planes
        self.stride = stride
        self.dilation = dilation
        self.downsample = downsample
        self.with_cp = with_cp
        self.relu = build_activation(units.act_cfg)

    def body(self, x: Tensor) -> Tensor:
        """The units beside the shortcut."""
        raise NotImplementedError

    def last_norms(self) -> list[nn.Module]:
        """The norms whose scales multiply all of the body's output."""
        index = max(
            int(name[4:]) for name in dict(self.named_children()) if name[:4] == 'conv'
        )
        norm = self.norm(index)
        if norm is not None:
            return [norm]
        conv = getattr(self, f'conv{index}')
        # A plain conv without a norm is fused.
        return conv.last_norms() if hasattr(conv, 'last_norms') else []

    def forward(self, x: Tensor) -> Tensor:
        """``(N, inplanes, H, W)`` to ``(N, expansion * planes, H', W')``."""
        return self.relu(run_block(self, self._body_and_shortcut, x, self.with_cp))

    def _body_and_shortcut(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.body(x) + shortcut

    @property
    def norm2(self) -> nn.Module | None:
        """The norm of the second unit."""
        return self.norm(2)


class BasicBlock(ResidualBlock):
    """Two 3x3 units.

    Args:
        inplanes (int): Number of input channels.
        planes (int): Number of output channels.
        units (UnitConfig): What the units are.
        style (str): Ignored: it says which conv of a ``Bottleneck`` has the stride.
            Default: ``'pytorch'``.
        dcn (None): Not supported in this block, only in ``Bottleneck``. Default: None.
        plugins (None): As ``dcn``. Default: None.
        **kwargs: See :class:`ResidualBlock`.
    """

    def __init__(
        self,
        inplanes: int,
        planes: int,
        units: UnitConfig,
        style: str = 'pytorch',
        dcn: None = None,
        plugins: None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(inplanes, planes, units, **kwargs)
        require(dcn is None, 'dcn needs bottlenecks: depth 50, 101 or 152')
        require(plugins is None, 'plugins need bottlenecks: depth 50, 101 or 152')
        self.add_unit(
            1,
            units,
            inplanes,
            planes,
            3,
            stride=self.stride,
            padding=self.dilation,
            dilation=self.dilation,
        )
        self.add_unit(2, units, planes, planes, 3, padding=1)

    def body(self, x: Tensor) -> Tensor:
        return self.unit(2, self.relu(self.unit(1, x)))


class Bottleneck(ResidualBlock):
    """A 1x1, a 3x3 and a 1x1 unit.

    Args:
        inplanes (int): Number of input channels.
        planes (int): A quarter of the number of output channels.
        units (UnitConfig): What the units are.
        style (str): Where the stride is: ``'pytorch'``, on the 3x3 unit, or ``'caffe'``,
            on the first one. Default: ``'pytorch'``.
        dcn (dict, optional): Config of a deformable conv in the 3x3 unit; with
            ``fallback_on_stride=True``, a unit with a stride has a plain conv instead.
            Default: None.
        plugins (Sequence[dict], optional): Dicts with the config ``cfg`` of a layer and its
            ``position``: 'after_conv1', 'after_conv2' or 'after_conv3'. Layers at the same
            position are applied in this order. Default: None.
        **kwargs: See :class:`ResidualBlock`.
    """

    expansion = 4
    positions = ('after_conv1', 'after_conv2', 'after_conv3')

    def __init__(
        self,
        inplanes: int,
        planes: int,
        units: UnitConfig,
        style: str = 'pytorch',
        dcn: dict | None = None,
        plugins: Sequence[dict] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(inplanes, planes, units, **kwargs)
        require(
            style in ('pytorch', 'caffe'),
            f"style must be 'pytorch' or 'caffe', not {style!r}",
        )
        self.style = style
        self.with_dcn = dcn is not None
        self.with_plugins = plugins is not None
        self.conv1_stride, self.conv2_stride = (
            (1, self.stride) if style == 'pytorch' else (self.stride, 1)
        )
        dcn = dict(dcn or {})
        if dcn.pop('fallback_on_stride', False) and self.conv2_stride > 1:
            dcn = {}
        require(not (dcn and units.conv_cfg), 'conv_cfg must be None where dcn is given')
        self.add_unit(1, units, inplanes, planes, 1, stride=self.conv1_stride)
        self.add_unit(
            2,
            units,
            planes,
            planes,
            3,
            stride=self.conv2_stride,
            padding=self.dilation,
            dilation=self.dilation,
            conv_cfg=dcn or None,
        )
        self.add_unit(3, units, planes, planes * self.expansion, 1)
        self.plugin_names = self._add_plugins(plugins or ())

    def _add_plugins(self, plugins: Sequence[dict]) -> dict[str, list[str]]:
        channels = dict(zip(self.positions, (1, 1, self.expansion), strict=True))
        names = {position: [] for position in self.positions}
        for plugin in plugins:
            position, cfg = plugin['position'], dict(plugin['cfg'])
            require(
                position in names,
                f'plugin position {position!r} must be one of {self.positions}',
            )
            name, layer = build_plugin_layer(
                cfg,
                in_channels=self.planes * channels[position],
                postfix=cfg.pop('postfix', ''),
            )
            require(
                not hasattr(self, name),
                f'the name {name!r} of a plugin is taken: give the plugin a postfix',
            )
            self.add_module(name, layer)
            names[position].append(name)
        return names

    def _plugged(self, position: str, x: Tensor) -> Tensor:
        for name in self.plugin_names[position]:
            x = getattr(self, name)(x)
        return x

    def body(self, x: Tensor) -> Tensor:
        x = self._plugged('after_conv1', self.relu(self.unit(1, x)))
        x = self._plugged('after_conv2', self.relu(self.unit(2, x)))
        return self._plugged('after_conv3', self.unit(3, x))

    @property
    def norm3(self) -> nn.Module | None:
        """The norm of the third unit."""
        return self.norm(3)
