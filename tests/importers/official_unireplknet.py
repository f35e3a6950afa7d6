"""UniRepLKNet with the structure and the names of its authors' code.

Written from the paper and the names in the published weights, for comparison.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

#: Kernel sizes and dilations beside a depthwise conv of this size.
DILATED = {13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)), 7: ((5, 1), (3, 2), (3, 3))}


class LayerNorm(nn.LayerNorm):
    """Over the channels of maps."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        var = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / (var + self.eps).sqrt()
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class ToChannelsLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class ToChannelsFirst(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2)


class GRN(nn.Module):
    """Of maps whose channels are last; without a bias in deploy form."""

    def __init__(self, channels: int, bias: bool) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, channels)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        response = x.norm(p=2, dim=(1, 2), keepdim=True)
        response = response / (response.mean(-1, keepdim=True) + 1e-6)
        x = (self.gamma * response + 1) * x
        return x if self.beta is None else x + self.beta


class SE(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, channels // 4, 1)
        self.up = nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(x.mean((2, 3), keepdim=True)).relu()
        return x * self.up(y).sigmoid()


def depthwise(channels: int, size: int, dilation: int = 1, bias: bool = False) -> nn.Conv2d:
    padding = dilation * (size - 1) // 2
    options = dict(dilation=dilation, groups=channels, bias=bias)
    return nn.Conv2d(channels, channels, size, 1, padding, **options)


class Dilated(nn.Module):
    """A large kernel, and small dilated ones."""

    def __init__(self, channels: int, size: int, deploy: bool) -> None:
        super().__init__()
        self.lk_origin = depthwise(channels, size, bias=deploy)
        self.small = [] if deploy else [f'k{k}_{r}' for k, r in DILATED[size]]
        if deploy:
            return
        self.origin_bn = nn.BatchNorm2d(channels)
        for name, (k, r) in zip(self.small, DILATED[size], strict=True):
            self.add_module(f'dil_conv_{name}', depthwise(channels, k, r))
            self.add_module(f'dil_bn_{name}', nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        out = self.lk_origin(x)
        if hasattr(self, 'origin_bn'):
            out = self.origin_bn(out)
        for name in self.small:
            conv, norm = getattr(self, f'dil_conv_{name}'), getattr(self, f'dil_bn_{name}')
            out = out + norm(conv(x))
        return out


class Block(nn.Module):
    def __init__(self, channels: int, size: int, deploy: bool) -> None:
        super().__init__()
        large = Dilated if size >= 7 else depthwise
        options = dict(deploy=deploy) if size >= 7 else dict(bias=deploy)
        self.dwconv = large(channels, size, **options)
        self.norm = nn.Identity() if deploy else nn.BatchNorm2d(channels)
        self.se = SE(channels)
        hidden = 4 * channels
        self.pwconv1 = nn.Sequential(ToChannelsLast(), nn.Linear(channels, hidden))
        self.act = nn.Sequential(nn.GELU(), GRN(hidden, bias=not deploy))
        linear = nn.Linear(hidden, channels, bias=deploy)
        self.pwconv2 = nn.Sequential(linear, ToChannelsFirst())
        self.gamma = None
        if not deploy:
            self.pwconv2.append(nn.BatchNorm2d(channels))
            self.gamma = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.se(self.norm(self.dwconv(x)))
        y = self.pwconv2(self.act(self.pwconv1(y)))
        return x + (y if self.gamma is None else self.gamma[:, None, None] * y)


class UniRepLKNet(nn.Module):
    """Four stages; a linear layer on the mean, or the outputs of all stages.

    Args:
        dims: Channels of each stage.
        sizes: Kernel size of each block of each stage.
        num_classes: Number of classes; ``None`` for the outputs, each after a norm.
        deploy: Whether blocks are single convs.
    """

    def __init__(
        self,
        dims: Sequence[int],
        sizes: Sequence[Sequence[int]],
        num_classes: int | None = 10,
        deploy: bool = False,
    ) -> None:
        super().__init__()

        def halve(ins: int, outs: int) -> list[nn.Module]:
            return [nn.Conv2d(ins, outs, 3, 2, 1), LayerNorm(outs, eps=1e-6)]

        half = dims[0] // 2
        stem = nn.Sequential(*halve(3, half), nn.GELU(), *halve(half, dims[0]))
        others = (nn.Sequential(*halve(*pair)) for pair in pairwise(dims))
        self.downsample_layers = nn.ModuleList([stem, *others])
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(width, size, deploy) for size in of_stage))
            for width, of_stage in zip(dims, sizes, strict=True)
        )
        self.is_classifier = num_classes is not None
        if self.is_classifier:
            self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
            self.head = nn.Linear(dims[-1], num_classes)
        else:
            for i, width in enumerate(dims):
                self.add_module(f'norm{i}', LayerNorm(width, eps=1e-6))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        outs = []
        for i, (halve, stage) in enumerate(
            zip(self.downsample_layers, self.stages, strict=True)
        ):
            x = stage(halve(x))
            if not self.is_classifier:
                outs.append(getattr(self, f'norm{i}')(x))
        return self.head(self.norm(x.mean((2, 3)))) if self.is_classifier else tuple(outs)
