"""The networks of DBB's authors, with the structure and the names of their code.

Written from the paper and the names in the published weights, for comparison; eval mode
alone.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class ConvBN(nn.Module):
    """A plain unit."""

    def __init__(
        self,
        ins: int,
        outs: int,
        size: int,
        stride: int = 1,
        deploy: bool = False,
        relu: bool = True,
    ) -> None:
        super().__init__()
        self.relu = relu
        self.conv = nn.Conv2d(ins, outs, size, stride, size // 2, bias=deploy)
        if not deploy:
            self.bn = nn.BatchNorm2d(outs)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        out = self.bn(out) if hasattr(self, 'bn') else out
        return out.relu() if self.relu else out


class BorderedBN(nn.Module):
    """A norm, with a border of what it makes of a zero."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        border = self.bn(x.new_zeros(1, x.shape[1], 1, 1))
        # Zeros are padded to what is above the border, which is added to everything.
        return F.pad(self.bn(x) - border, [1] * 4) + border


class IdentityConv(nn.Conv2d):
    """A 1x1 conv that is added to the identity."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class DBB(nn.Module):
    """A 3x3 Diverse Branch Block."""

    def __init__(
        self,
        ins: int,
        outs: int,
        stride: int = 1,
        groups: int = 1,
        deploy: bool = False,
        relu: bool = True,
    ) -> None:
        super().__init__()
        self.relu = relu
        common = dict(groups=groups, bias=False)
        if deploy:
            self.dbb_reparam = nn.Conv2d(ins, outs, 3, stride, 1, groups=groups)
            return

        def branch(**layers: nn.Module) -> nn.Sequential:
            return nn.Sequential(OrderedDict(layers))

        depthwise = groups >= outs
        self.dbb_origin = branch(
            conv=nn.Conv2d(ins, outs, 3, stride, 1, **common), bn=nn.BatchNorm2d(outs)
        )
        if depthwise:
            first = dict(conv1=nn.Conv2d(ins, 2 * ins, 1, **common))
            self.dbb_avg = branch(
                avg=nn.AvgPool2d(3, stride, 1), avgbn=nn.BatchNorm2d(outs)
            )
        else:
            first = dict(idconv1=IdentityConv(ins, ins, 1, **common))
            self.dbb_avg = branch(
                conv=nn.Conv2d(ins, outs, 1, **common),
                bn=BorderedBN(outs),
                avg=nn.AvgPool2d(3, stride),
                avgbn=nn.BatchNorm2d(outs),
            )
            self.dbb_1x1 = branch(
                conv=nn.Conv2d(ins, outs, 1, stride, **common), bn=nn.BatchNorm2d(outs)
            )
        mid = 2 * ins if depthwise else ins
        self.dbb_1x1_kxk = branch(
            **first,
            bn1=BorderedBN(mid),
            conv2=nn.Conv2d(mid, outs, 3, stride, **common),
            bn2=nn.BatchNorm2d(outs),
        )

    def forward(self, x: Tensor) -> Tensor:
        out = sum(branch(x) for branch in self.children())
        return out.relu() if self.relu else out


class ResidualBlock(nn.Module):
    """A basic block of two 3x3 units, or a bottleneck with the stride on its 3x3."""

    def __init__(
        self,
        ins: int,
        planes: int,
        stride: int,
        bottleneck: bool,
        deploy: bool,
        unit: type[nn.Module] = DBB,
        pointwise: type[nn.Module] = ConvBN,
    ) -> None:
        super().__init__()
        outs = planes * (4 if bottleneck else 1)
        self.shortcut = nn.Identity()
        if stride != 1 or ins != outs:
            shortcut = pointwise if bottleneck else ConvBN
            self.shortcut = shortcut(ins, outs, 1, stride, deploy, relu=False)
        if bottleneck:
            self.conv1 = pointwise(ins, planes, 1, deploy=deploy)
            self.conv2 = unit(planes, planes, stride, deploy=deploy)
            self.conv3 = pointwise(planes, outs, 1, deploy=deploy, relu=False)
        else:
            self.conv1 = unit(ins, planes, stride, deploy=deploy)
            self.conv2 = unit(planes, outs, deploy=deploy, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(self.conv1(x))
        out = self.conv3(out) if hasattr(self, 'conv3') else out
        return (out + self.shortcut(x)).relu()


class ResNet(nn.Module):
    """ResNet of DBBs.

    Args:
        num_blocks: Blocks of each stage.
        bottleneck: Whether they are bottlenecks.
        width: Channels of the stem and inside the first stage.
        deploy: Whether units are convs.
        stem: The 7x7 unit.
        **units: The 3x3 and the 1x1 units of :class:`ResidualBlock`.
    """

    def __init__(
        self,
        num_blocks: Sequence[int],
        bottleneck: bool,
        width: int = 64,
        num_classes: int = 10,
        deploy: bool = False,
        stem: type[nn.Module] = ConvBN,
        **units: type[nn.Module],
    ) -> None:
        super().__init__()
        stem = stem(3, width, 7, 2, deploy)
        pool = nn.MaxPool2d(3, 2, 1)
        self.stage0 = nn.Sequential(OrderedDict(conv1=stem, maxpool=pool))
        ins = width
        for i, count in enumerate(num_blocks):
            stage = nn.Sequential()
            for j in range(count):
                stride = 2 if i and j == 0 else 1
                stage.append(
                    ResidualBlock(ins, width * 2**i, stride, bottleneck, deploy, **units)
                )
                ins = width * 2**i * (4 if bottleneck else 1)
            self.add_module(f'stage{i + 1}', stage)
        self.linear = nn.Linear(ins, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(5):
            x = getattr(self, f'stage{i}')(x)
        return self.linear(x.mean((2, 3)))


class MobileNet(nn.Module):
    """MobileNetV1 of DBBs.

    Args:
        width: Channels of the stem.
        deploy: Whether units are convs.
    """

    #: Channels of the layers, in those of the stem.
    widths = (2, 4, 4, 8, 8, *(16,) * 6, 32, 32)

    def __init__(
        self, width: int = 32, num_classes: int = 10, deploy: bool = False
    ) -> None:
        super().__init__()
        self.conv1 = DBB(3, width, 2, deploy=deploy)
        self.stem = nn.Sequential()
        ins = width
        for i, factor in enumerate(self.widths):
            stride = 2 if i in (1, 3, 5, 11) else 1
            layer = dict(
                depthwise=DBB(ins, ins, stride, groups=ins, deploy=deploy),
                pointwise=ConvBN(ins, width * factor, 1, deploy=deploy),
            )
            self.stem.append(nn.Sequential(OrderedDict(layer)))
            ins = width * factor
        self.linear = nn.Linear(ins, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.stem(self.conv1(x)).mean((2, 3)))


def in_published_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights as the published files hold them: older than the code."""
    return {
        key.replace('bn.bn.', 'bn.').replace('bn1.bn.', 'bn1.'): value
        for key, value in state.items()
        if not key.endswith('num_batches_tracked')
    }
