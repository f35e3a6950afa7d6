"""The Diverse Branch Block as its authors compute it, for comparison.

Written from the paper (section 3.3) and facts of its code: branch by branch, with a
padded copy whose border is what the first norm makes of a zero, by the running
statistics after their update and without a gradient. The names are mmrep's.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Size = tuple[int, int]


class OfficialDBB(nn.Module):
    """All four branches, with the padding that keeps the size at stride 1."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = (1, 1),
        dilation: Size = (1, 1),
        groups: int = 1,
    ) -> None:
        super().__init__()
        depthwise = groups == in_channels == out_channels
        mid = 2 * in_channels if depthwise else in_channels
        self.stride, self.dilation, self.groups = stride, dilation, groups
        self.padding = tuple(
            d * (k - 1) // 2 for k, d in zip(kernel_size, dilation, strict=True)
        )
        self.kernel_size = kernel_size

        def conv(ins: int, outs: int, kernel_size: Size = (1, 1)) -> nn.Conv2d:
            return nn.Conv2d(ins, outs, kernel_size, groups=groups, bias=False)

        def branch(**layers: nn.Module) -> nn.ModuleDict:
            return nn.ModuleDict(layers)

        outs = out_channels
        self.branch_kxk = branch(
            conv=conv(in_channels, outs, kernel_size), norm=nn.BatchNorm2d(outs)
        )
        self.branch_1x1_kxk = branch(
            conv1=conv(in_channels, mid),
            norm1=nn.BatchNorm2d(mid),
            conv2=conv(mid, outs, kernel_size),
            norm2=nn.BatchNorm2d(outs),
        )
        self.identity = None
        if depthwise:
            self.branch_1x1 = None
            self.branch_avg = branch(norm2=nn.BatchNorm2d(outs))
        else:
            self.branch_1x1 = branch(
                conv=conv(in_channels, outs), norm=nn.BatchNorm2d(outs)
            )
            self.branch_avg = branch(
                conv1=conv(in_channels, outs),
                norm1=nn.BatchNorm2d(outs),
                norm2=nn.BatchNorm2d(outs),
            )
            width = in_channels // groups
            self.identity = torch.zeros(in_channels, width, 1, 1, dtype=torch.float64)
            for channel in range(in_channels):
                self.identity[channel, channel % width] = 1

    def convolve(
        self, x: Tensor, weight: Tensor, padding: Iterable[int] = (0, 0)
    ) -> Tensor:
        """A strided and dilated conv, or a plain 1x1."""
        place = self.stride, tuple(padding), self.dilation
        return F.conv2d(x, weight, None, *place, self.groups)

    def pointwise(self, x: Tensor, weight: Tensor) -> Tensor:
        """A leading 1x1 conv."""
        return F.conv2d(x, weight, groups=self.groups)

    def bordered(self, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
        """``norm(x)`` with a border of what the norm makes of a zero."""
        y = norm(x)
        scale = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
        border = norm.bias.detach() - norm.running_mean * scale
        rows, columns = self.padding
        height, width = y.shape[2] + 2 * rows, y.shape[3] + 2 * columns
        padded = border.reshape(1, -1, 1, 1).expand(len(y), -1, height, width).clone()
        padded[:, :, rows : height - rows, columns : width - columns] = y
        return padded

    def average(self, x: Tensor) -> Tensor:
        """The mean of the pixels under the taps."""
        if self.dilation == (1, 1):
            return F.avg_pool2d(x, self.kernel_size, self.stride)
        taps = F.unfold(x, self.kernel_size, self.dilation, 0, self.stride)
        size = [
            (pixels - (k - 1) * d - 1) // s + 1
            for pixels, k, d, s in zip(
                x.shape[2:], self.kernel_size, self.dilation, self.stride, strict=True
            )
        ]
        return taps.unflatten(1, (x.shape[1], -1)).mean(2).unflatten(2, size)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.branch_kxk
        out = branch.norm(self.convolve(x, branch.conv.weight, self.padding))
        if self.branch_1x1 is not None:
            y = F.conv2d(
                x, self.branch_1x1.conv.weight, None, self.stride, groups=self.groups
            )
            out = out + self.branch_1x1.norm(y)
        branch, weight = self.branch_1x1_kxk, self.branch_1x1_kxk.conv1.weight
        if self.identity is not None:
            weight = weight + self.identity.to(weight)
        y = self.bordered(branch.norm1, self.pointwise(x, weight))
        out = out + branch.norm2(self.convolve(y, branch.conv2.weight))
        branch = self.branch_avg
        if self.branch_1x1 is None:
            rows, columns = self.padding
            y = F.pad(x, (columns, columns, rows, rows))
        else:
            y = self.bordered(branch.norm1, self.pointwise(x, branch.conv1.weight))
        return out + branch.norm2(self.average(y))
