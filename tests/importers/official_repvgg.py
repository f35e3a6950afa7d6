"""RepVGG and RepVGGplus with the structure and the names of their authors' code.

Written from the papers and the names in the published weights, for comparison.
"""

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn


def conv_bn(conv: nn.Conv2d, **layers: nn.Module) -> nn.Sequential:
    """A conv, a norm and what else there is, by name."""
    norm = nn.BatchNorm2d(conv.out_channels)
    return nn.Sequential(OrderedDict(conv=conv, bn=norm, **layers))


class SE(nn.Module):
    """Squeeze-and-excitation."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, squeezed, 1)
        self.up = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(x.mean((2, 3), keepdim=True)).relu()
        return x * self.up(y).sigmoid()


class Block(nn.Module):
    """A block of either network; a ratio puts an SE layer before or after the ReLU."""

    def __init__(
        self,
        ins: int,
        outs: int,
        stride: int = 1,
        groups: int = 1,
        se: int = 0,
        post_se: int = 0,
        deploy: bool = False,
        conv: type[nn.Conv2d] = nn.Conv2d,
    ) -> None:
        super().__init__()
        options = dict(stride=stride, groups=groups, bias=deploy)
        self.se = SE(outs, outs // se) if se else nn.Identity()
        self.post_se = SE(outs, outs // post_se) if post_se else nn.Identity()
        dense = conv(ins, outs, 3, padding=1, **options)
        if deploy:
            self.rbr_reparam = dense
            return
        self.rbr_identity = nn.BatchNorm2d(ins) if ins == outs and stride == 1 else None
        self.rbr_dense = conv_bn(dense)
        self.rbr_1x1 = conv_bn(conv(ins, outs, 1, **options))

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, 'rbr_reparam'):
            out = self.rbr_reparam(x)
        else:
            out = self.rbr_dense(x) + self.rbr_1x1(x)
            if self.rbr_identity is not None:
                out = out + self.rbr_identity(x)
        return self.post_se(self.se(out).relu())


class RepVGG(nn.Module):
    """A stem, four stages and a linear layer.

    Args:
        num_blocks: Blocks of each stage.
        widths: Channels of each stage; the stem has as many as the first, up to 64.
        groups: Groups of blocks by their number, the first after the stem being 1.
        block: The type of the blocks.
        **options: Of every block.
    """

    def __init__(
        self,
        num_blocks: Sequence[int],
        widths: Sequence[int],
        groups: dict[int, int] | None = None,
        num_classes: int = 10,
        block: type[nn.Module] = Block,
        **options,
    ) -> None:
        super().__init__()
        ins, number = min(64, widths[0]), 0
        self.stage0 = block(3, ins, 2, **options)
        for i, (count, outs) in enumerate(zip(num_blocks, widths, strict=True), 1):
            stage = nn.Sequential()
            for j in range(count):
                number += 1
                stride, group = 1 if j else 2, (groups or {}).get(number, 1)
                stage.append(block(ins, outs, stride, group, **options))
                ins = outs
            self.add_module(f'stage{i}', stage)
        self.linear = nn.Linear(ins, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(5):
            x = getattr(self, f'stage{i}')(x)
        return self.linear(x.mean((2, 3)))


class Stage(nn.Module):
    """A stage of RepVGGplus."""

    def __init__(self, ins: int, outs: int, count: int, stride: int, **options) -> None:
        super().__init__()
        blocks = [Block(ins, outs, stride, **options)]
        blocks += [Block(outs, outs, **options) for _ in range(1, count)]
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class RepVGGplus(nn.Module):
    """A stem and five stages, the third and fourth of which are one of RepVGG's.

    Args:
        num_blocks: Blocks of the four stages.
        widths: Channels of the four stages.
        deploy: Whether blocks are convs; then there are no auxiliary classifiers.
    """

    auxiliary = ('stage1', 'stage2', 'stage3_first')

    def __init__(
        self,
        num_blocks: Sequence[int],
        widths: Sequence[int],
        num_classes: int = 10,
        deploy: bool = False,
    ) -> None:
        super().__init__()
        options = dict(post_se=4, deploy=deploy)
        first, second, third, fourth = widths
        half = num_blocks[2] // 2
        stem = min(64, first)
        self.stage0 = Block(3, stem, 2, **options)
        self.stage1 = Stage(stem, first, num_blocks[0], 2, **options)
        self.stage2 = Stage(first, second, num_blocks[1], 2, **options)
        self.stage3_first = Stage(second, third, half, 2, **options)
        self.stage3_second = Stage(third, third, half, 1, **options)
        self.stage4 = Stage(third, fourth, num_blocks[3], 2, **options)
        self.linear = nn.Linear(fourth, num_classes)
        if deploy:
            return
        for name, width in zip(self.auxiliary, widths[:3], strict=True):
            conv = nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False)
            classifier = nn.Sequential(
                conv_bn(conv, relu=nn.ReLU()),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(width, num_classes),
            )
            self.add_module(f'{name}_aux', classifier)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The logits of the classifiers, the main one's under ``'main'``."""
        logits = {}
        for name in ('stage0', *self.auxiliary, 'stage3_second', 'stage4'):
            x = getattr(self, name)(x)
            if hasattr(self, f'{name}_aux'):
                logits[name] = getattr(self, f'{name}_aux')(x)
        return {'main': self.linear(x.mean((2, 3))), **logits}
