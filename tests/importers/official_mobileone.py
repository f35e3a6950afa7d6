"""MobileOne with the structure and the names of its authors' code.

Written from the paper and the names in the published weights, for comparison.
"""

from collections.abc import Sequence

from official_repvgg import conv_bn
from torch import Tensor, nn


class SE(nn.Module):
    """Squeeze-and-excitation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, channels // 16, 1)
        self.expand = nn.Conv2d(channels // 16, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.reduce(x.mean((2, 3), keepdim=True)).relu()
        return x * self.expand(y).sigmoid()


class Block(nn.Module):
    """A block of ``branches`` kxk convs."""

    def __init__(
        self,
        ins: int,
        outs: int,
        kernel_size: int,
        branches: int,
        stride: int = 1,
        groups: int = 1,
        se: bool = False,
        deploy: bool = False,
    ) -> None:
        super().__init__()
        self.se = SE(outs) if se else nn.Identity()

        def conv(size: int, bias: bool = False) -> nn.Conv2d:
            return nn.Conv2d(ins, outs, size, stride, size // 2, groups=groups, bias=bias)

        if deploy:
            self.reparam_conv = conv(kernel_size, bias=True)
            return
        self.rbr_skip = nn.BatchNorm2d(ins) if ins == outs and stride == 1 else None
        self.rbr_conv = nn.ModuleList(conv_bn(conv(kernel_size)) for _ in range(branches))
        self.rbr_scale = conv_bn(conv(1)) if kernel_size > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, 'reparam_conv'):
            return self.se(self.reparam_conv(x)).relu()
        branches = [*self.rbr_conv, self.rbr_scale, self.rbr_skip]
        return self.se(sum(b(x) for b in branches if b is not None)).relu()


class MobileOne(nn.Module):
    """A stem, four stages of depthwise and pointwise blocks, and a linear layer.

    Args:
        num_blocks: Pairs of blocks of each stage.
        widths: Channels of each stage; the stem has as many as the first, up to 64.
        branches: kxk branches of every block; the stem has one.
        num_se: How many of the last pairs of each stage have SE layers.
    """

    def __init__(
        self,
        num_blocks: Sequence[int],
        widths: Sequence[int],
        branches: int = 1,
        num_se: Sequence[int] = (0, 0, 0, 0),
        deploy: bool = False,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        ins = min(64, widths[0])
        self.stage0 = Block(3, ins, 3, 1, stride=2, deploy=deploy)
        for i, (count, outs) in enumerate(zip(num_blocks, widths, strict=True)):
            stage = nn.Sequential()
            for j in range(count):
                options = dict(se=j >= count - num_se[i], deploy=deploy)
                stride = 1 if j else 2
                stage.append(Block(ins, ins, 3, branches, stride, groups=ins, **options))
                stage.append(Block(ins, outs, 1, branches, **options))
                ins = outs
            self.add_module(f'stage{i + 1}', stage)
        self.linear = nn.Linear(ins, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(5):
            x = getattr(self, f'stage{i}')(x)
        return self.linear(x.mean((2, 3)))
