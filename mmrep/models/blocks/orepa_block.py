"""OREPA's blocks, which compute as one conv in training, too."""

from collections import OrderedDict
from dataclasses import replace
from typing import Any

from mmengine.model import Sequential
from torch import nn

from mmrep.registry import MODELS

from ..layers import CosineFilters, DilatedAvgPool2d, IdentityConv1x1
from .base import ReparamBlock, Size

#: The branches and the initial values of their scales, from the paper's code.
SCALES = {
    'kxk': 0.25,
    'avg': 0.25,
    'prior': 0.0,
    '1x1_kxk': 0.5,
    '1x1': 1.0,
    'separable': 0.5,
}
#: Ratio of the channels inside the separable branch to its input channels.
_EXPANSION = 8


@MODELS.register_module()
class OREPABlock(ReparamBlock):
    """``y = act(se(norm(sum_b v_b branch_b(x))))``, a norm after the sum and none inside.

    So the branches can compute as one conv in training, too: a step costs one conv and the
    derivation of its kernel ``W = sum_b v_b W_b``. Every branch has a scale ``v`` for each
    output channel. The branches are

    - ``kxk``: a kxk conv;
    - ``avg``: a 1x1 conv and an average pooling;
    - ``prior``: a 1x1 conv and fixed cosine filters,
      :class:`~mmrep.models.layers.CosineFilters`;
    - ``1x1_kxk``: a 1x1 conv that starts as the identity, and a kxk conv; with more than 4
      groups the first is a plain 1x1 conv to twice as many channels;
    - ``1x1``: a 1x1 conv;
    - ``separable``: a depthwise conv to 8 times as many channels, and a 1x1 conv.

    A 1x1 block has only ``kxk`` and ``1x1_kxk``, as the others would be ``kxk`` again. The
    other arguments are :class:`~mmrep.models.blocks.ReparamBlock`'s.

    Source: `Online Convolutional Re-parameterization <https://arxiv.org/abs/2204.00826>`_,
    section 3.2 and figure 4, and its code.

    Args:
        in_channels, out_channels: See the base.
        kernel_size (int | tuple[int, int]): Rows and columns of the kernel. Default: 3.
        scales (dict[str, float], optional): The names of the branches, ``kxk`` among them,
            and the initial values of their scales. Default: None, all of the above, with
            the paper's 0.25, 0.25, 0, 0.5, 1 and 0.5.
        act_cfg (dict, optional): Config of the activation. Default: None, none.
        one_conv (bool | int | str): See the base. Default: True.
        **kwargs: The options of :class:`~mmrep.models.blocks.ReparamBlock`, by name.

    Raises:
        ValueError: If ``scales`` has no ``kxk``, or a name that is not listed above.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Size = 3,
        *,
        scales: dict[str, float] | None = None,
        act_cfg: dict | None = None,
        one_conv: bool | int | str = True,
        **kwargs: Any,
    ) -> None:
        self.scales = SCALES if scales is None else scales
        if 'kxk' not in self.scales or set(self.scales) - set(SCALES):
            raise ValueError(
                f"scales must include 'kxk', and only names of {', '.join(SCALES)}, not "
                f'{", ".join(self.scales) or "nothing"}'
            )
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            act_cfg=act_cfg,
            one_conv=one_conv,
            **kwargs,
        )

    def build_branches(self) -> dict[str, nn.Module]:
        builders = {
            'kxk': self._kxk,
            'avg': self._avg,
            'prior': self._prior,
            '1x1_kxk': self._1x1_kxk,
            '1x1': self._1x1,
            'separable': self._separable,
        }
        if self.kernel_size == (1, 1):
            builders = {name: builders[name] for name in ('kxk', '1x1_kxk')}
        return {
            f'branch_{name}': Sequential(
                OrderedDict(build(), scale=self.build_scale(self.scales[name]))
            )
            for name, build in builders.items()
            if name in self.scales
        }

    def build_post_norm(self) -> nn.Module:
        return self.build_norm(self.out_channels)

    def _kxk(self) -> dict[str, nn.Module]:
        return dict(conv=self.build_conv(self.kernel_size))

    def _avg(self) -> dict[str, nn.Module]:
        pool = DilatedAvgPool2d(replace(self.geometry, in_channels=self.out_channels))
        return dict(conv=self.pointwise_conv(self.out_channels), pool=pool)

    def _prior(self) -> dict[str, nn.Module]:
        filters = CosineFilters(replace(self.geometry, in_channels=self.out_channels))
        return dict(conv=self.pointwise_conv(self.out_channels), filters=filters)

    def _1x1_kxk(self) -> dict[str, nn.Module]:
        if self.groups > 4:
            inner = 2 * self.in_channels
            conv1 = self.pointwise_conv(inner)
        else:
            inner = self.in_channels
            conv1 = IdentityConv1x1(inner, self.groups)
        return dict(conv1=conv1, conv2=self.build_conv(self.kernel_size, in_channels=inner))

    def _1x1(self) -> dict[str, nn.Module]:
        return self.aligned_conv(1)

    def _separable(self) -> dict[str, nn.Module]:
        inner = _EXPANSION * self.in_channels
        depthwise = self.build_conv(
            self.kernel_size, out_channels=inner, groups=self.in_channels
        )
        pointwise = self.build_conv(1, in_channels=inner, stride=1, padding=0, dilation=1)
        return dict(depthwise=depthwise, pointwise=pointwise)


@MODELS.register_module()
class OREPARepVGGBlock(ReparamBlock):
    """``y = act(se(orepa(x) + norm(conv1x1(x)) + norm(x)))``.

    RepVGG's block, with an OREPA block in the place of the kxk conv and its norm. The
    identity is a branch only where input and output have the same shape. The other
    arguments are :class:`~mmrep.models.blocks.ReparamBlock`'s.

    Source: `Online Convolutional Re-parameterization <https://arxiv.org/abs/2204.00826>`_,
    section 4.3 and its code.

    Args:
        in_channels, out_channels: See the base.
        kernel_size (int | tuple[int, int]): Rows and columns of the kernel. Default: 3.
        scales (dict[str, float], optional): See :class:`OREPABlock`. Default: None, the
            paper's for this block, all of the default there but ``1x1``.
        one_conv (bool | int | str): See the base. Default: True.
        **kwargs: The options of :class:`~mmrep.models.blocks.ReparamBlock`, by name.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Size = 3,
        *,
        scales: dict[str, float] | None = None,
        one_conv: bool | int | str = True,
        **kwargs: Any,
    ) -> None:
        if scales is None:
            # The 1x1 conv is a branch of this block, with a norm.
            scales = {name: SCALES[name] for name in SCALES if name != '1x1'}
        self.scales = scales
        super().__init__(
            in_channels, out_channels, kernel_size, one_conv=one_conv, **kwargs
        )

    def build_branches(self) -> dict[str, nn.Module]:
        branches = {
            'branch_orepa': self.nested(OREPABlock, scales=self.scales),
            'branch_1x1': self.build_conv_norm(**self.aligned_conv(1)),
        }
        if self.keeps_shape:
            branches['branch_norm'] = self.build_norm(self.in_channels)
        return branches
