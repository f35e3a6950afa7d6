"""The blocks of QARepVGG and RepOptimizer with the names of their authors' code."""

import torch
from official_repvgg import conv_bn
from torch import Tensor, nn


class QARepVGGBlock(nn.Module):
    """A norm after the sum, and one of the 3x3 conv."""

    def __init__(self, ins: int, outs: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        options = dict(stride=stride, groups=groups, bias=False)
        self.keeps_shape = ins == outs and stride == 1
        self.rbr_dense = conv_bn(nn.Conv2d(ins, outs, 3, padding=1, **options))
        self.rbr_1x1 = nn.Conv2d(ins, outs, 1, **options)
        self.bn = nn.BatchNorm2d(outs)

    def forward(self, x: Tensor) -> Tensor:
        out = self.rbr_dense(x) + self.rbr_1x1(x)
        return self.bn(out + x if self.keeps_shape else out).relu()


class PlainBlock(nn.Module):
    """A conv, a norm and an activation."""

    def __init__(self, ins: int, outs: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(ins, outs, 3, stride, 1, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outs)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu()


class Scale(nn.Module):
    """A factor for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight[:, None, None]


class SearchBlock(nn.Module):
    """A norm after the sum of scaled branches."""

    def __init__(self, ins: int, outs: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        options = dict(stride=stride, groups=groups, bias=False)
        self.conv = nn.Conv2d(ins, outs, 3, padding=1, **options)
        self.scale_conv = Scale(outs)
        self.conv_1x1 = nn.Conv2d(ins, outs, 1, **options)
        self.scale_1x1 = Scale(outs)
        if ins == outs and stride == 1:
            self.scale_identity = Scale(outs)
        self.bn = nn.BatchNorm2d(outs)

    def forward(self, x: Tensor) -> Tensor:
        out = self.scale_conv(self.conv(x)) + self.scale_1x1(self.conv_1x1(x))
        if hasattr(self, 'scale_identity'):
            out = out + self.scale_identity(x)
        return self.bn(out).relu()
