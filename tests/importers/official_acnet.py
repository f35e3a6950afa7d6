"""ACNet's block and ResNet with the names of their authors' code, for comparison."""

from collections import OrderedDict
from collections.abc import Sequence

from official_repvgg import conv_bn
from torch import Tensor, nn


class ACB(nn.Module):
    """A kxk unit of three convs, each with a norm."""

    def __init__(
        self,
        ins: int,
        outs: int,
        stride: int = 1,
        deploy: bool = False,
        relu: bool = True,
        size: int = 3,
    ) -> None:
        super().__init__()
        self.relu = relu
        half = size // 2
        if deploy:
            self.fused_conv = nn.Conv2d(ins, outs, size, stride, half)
            return
        for name, taps in (
            ('square', (size, size)),
            ('ver', (size, 1)),
            ('hor', (1, size)),
        ):
            padding = tuple(tap // 2 for tap in taps)
            conv = nn.Conv2d(ins, outs, taps, stride, padding, bias=False)
            self.add_module(f'{name}_conv', conv)
            self.add_module(f'{name}_bn', nn.BatchNorm2d(outs))

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, 'fused_conv'):
            out = self.fused_conv(x)
        else:
            out = (
                self.square_bn(self.square_conv(x))
                + self.ver_bn(self.ver_conv(x))
                + self.hor_bn(self.hor_conv(x))
            )
        return out.relu() if self.relu else out


def unit(*args, **kwargs) -> nn.Sequential:
    """A unit with an activation, as the builder of the first project makes it."""
    block = ACB(*args, relu=False, **kwargs)
    return nn.Sequential(OrderedDict(acb=block, relu=nn.ReLU()))


class Bottleneck(nn.Module):
    """The residual branch."""

    def __init__(self, ins: int, inner: int, outs: int, stride: int, deploy: bool) -> None:
        super().__init__()
        self.conv1 = conv_bn(nn.Conv2d(ins, inner, 1, bias=False), relu=nn.ReLU())
        self.conv2 = unit(inner, inner, stride, deploy)
        self.conv3 = conv_bn(nn.Conv2d(inner, outs, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(self.conv2(self.conv1(x)))


class Stage(nn.Module):
    """Residual branches, the first beside a projection."""

    def __init__(self, ins: int, width: int, count: int, stride: int, deploy: bool) -> None:
        super().__init__()
        outs = 4 * width
        self.projection = conv_bn(nn.Conv2d(ins, outs, 1, stride, bias=False))
        self.count = count
        for i in range(count):
            block = Bottleneck(outs if i else ins, width, outs, 1 if i else stride, deploy)
            self.add_module(f'block{i}', block)

    def forward(self, x: Tensor) -> Tensor:
        out = (self.projection(x) + self.block0(x)).relu()
        for i in range(1, self.count):
            out = (out + getattr(self, f'block{i}')(out)).relu()
        return out


class StagewiseResNet(nn.Module):
    """The first project's ResNet of bottlenecks, whose stem is a block as well.

    Its fused form leaves the norms of plain convs where they are.
    """

    def __init__(
        self,
        num_blocks: Sequence[int],
        width: int = 64,
        num_classes: int = 10,
        deploy: bool = False,
    ) -> None:
        super().__init__()
        self.conv1 = unit(3, width, 2, deploy, size=7)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        ins = width
        for i, count in enumerate(num_blocks):
            stage = Stage(ins, width * 2**i, count, 2 if i else 1, deploy)
            self.add_module(f'stage{i + 1}', stage)
            ins = 4 * width * 2**i
        self.fc = nn.Linear(ins, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.conv1(x))
        for i in range(1, 5):
            x = getattr(self, f'stage{i}')(x)
        return self.fc(x.mean((2, 3)))
