"""The Diverse Branch Block."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from mmengine.model import Sequential
from torch import nn

from mmrep.registry import MODELS

from ..layers import DilatedAvgPool2d, IdentityConv1x1, PointwiseSpatial
from .base import ReparamBlock, Size


@MODELS.register_module()
class DiverseBranchBlock(ReparamBlock):
    """``y = kxk(x) + 1x1(x) + 1x1-kxk(x) + 1x1-avg(x)``, a norm after every conv and pool.

    A drop-in for a kxk conv and its norm. A depthwise block has no 1x1 branch, and no
    1x1 conv before its pooling. The other arguments are
    :class:`~mmrep.models.blocks.ReparamBlock`'s.

    Source: `Diverse Branch Block: Building a Convolution as an Inception-like Unit
    <https://arxiv.org/abs/2103.13425>`_, section 3.3 and figure 3.

    Args:
        in_channels, out_channels, stride, padding, groups: See the base.
        kernel_size (int | tuple[int, int]): Rows and columns of the kernel. Default: 3.
        dilation (int | tuple[int, int]): Dilation of every kxk conv and of the pooling.
            Default: 1.
        internal_channels (int, optional): Number of channels inside the 1x1-kxk branch.
            Default: None, ``in_channels``, or twice as many in a depthwise block.
        branches (Sequence[str]): Which branches to build, in the paper's names. Default:
            ``('kxk', '1x1', '1x1_kxk', 'avg')``.
        single_init (bool): Start as the kxk branch alone: the scale of its norm is 1, that
            of the last norm of every other branch 0. Default: False.
        act_cfg (dict, optional): Config of the activation. Default: None, none.
        **kwargs: The options of :class:`~mmrep.models.blocks.ReparamBlock`, by name.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Size = 3,
        stride: int | Size = 1,
        padding: int | Size | None = None,
        dilation: int | Size = 1,
        groups: int = 1,
        internal_channels: int | None = None,
        branches: Sequence[str] = ('kxk', '1x1', '1x1_kxk', 'avg'),
        single_init: bool = False,
        act_cfg: dict | None = None,
        **kwargs: Any,
    ) -> None:
        unknown = set(branches) - {'kxk', '1x1', '1x1_kxk', 'avg'}
        if unknown or 'kxk' not in branches:
            raise ValueError(
                "branches must include 'kxk' and may include '1x1', '1x1_kxk' and 'avg', "
                f'not {tuple(branches)}'
            )
        self.depthwise = groups == in_channels == out_channels
        if internal_channels is None:
            internal_channels = in_channels * (2 if self.depthwise else 1)
        if internal_channels % groups:
            raise ValueError(
                f'internal_channels={internal_channels} must be a multiple of '
                f'groups={groups}'
            )
        self.internal_channels = internal_channels
        self.chosen = tuple(branches)
        self.single_init = single_init
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            act_cfg=act_cfg,
            **kwargs,
        )
        if single_init:
            self._start_as_single_branch()

    def build_branches(self) -> dict[str, nn.Module]:
        branches = {'branch_kxk': self.build_conv_norm(self.build_conv(self.kernel_size))}
        if '1x1' in self.chosen and not self.depthwise:
            branches['branch_1x1'] = self.build_conv_norm(**self.aligned_conv(1))
        if '1x1_kxk' in self.chosen:
            branches['branch_1x1_kxk'] = self._build_1x1_kxk()
        if 'avg' in self.chosen:
            branches['branch_avg'] = self._build_avg()
        return branches

    def _build_1x1_kxk(self) -> PointwiseSpatial:
        internal = self.internal_channels
        if internal == self.in_channels:
            conv1 = IdentityConv1x1(internal, self.groups)
        else:
            conv1 = self.pointwise_conv(internal)
        return PointwiseSpatial(
            conv1,
            self.build_norm(internal),
            self.build_conv(self.kernel_size, in_channels=internal),
            self.build_norm(self.out_channels),
            self.geometry,
        )

    def _build_avg(self) -> nn.Module:
        pool = DilatedAvgPool2d(replace(self.geometry, in_channels=self.out_channels))
        norm = self.build_norm(self.out_channels)
        if self.depthwise:
            return Sequential(OrderedDict(pool=pool, norm2=norm))
        return PointwiseSpatial(
            self.pointwise_conv(self.out_channels),
            self.build_norm(self.out_channels),
            pool,
            norm,
            pool.geometry,
        )

    def init_weights(self) -> None:
        super().init_weights()
        if self.single_init:
            self._start_as_single_branch()

    @torch.no_grad()
    def _start_as_single_branch(self) -> None:
        for index, norm in enumerate(self.last_norms()):
            if norm.weight is not None:
                norm.weight.fill_(0.0 if index else 1.0)
