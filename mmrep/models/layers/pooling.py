"""Average pooling with everything that a conv has."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmrep.reparam import ConvGeometry, LinearConv, register_fold


class DilatedAvgPool2d(nn.Module):
    """Average over the taps of a conv: ``nn.AvgPool2d`` with dilation and padding modes.

    ``y = conv(x, 1 / (kh kw))`` on every channel; what is padded counts.

    Args:
        geometry (ConvGeometry): Channels, kernel size, stride, padding, dilation and
            padding mode of the conv whose taps are averaged. Its groups matter only
            where the pooling is folded.
    """

    def __init__(self, geometry: ConvGeometry) -> None:
        super().__init__()
        self.geometry = geometry

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, C, H', W')``."""
        trains = x.requires_grad and torch.is_grad_enabled()
        # On a CPU torch pools pixel by pixel, unless channels are last.
        slow = x.device.type == 'cpu' and x.is_contiguous() and x.dtype == torch.float32
        if trains and slow and not torch.jit.is_tracing():
            return self._as_conv(x)
        return self._pool(x)

    def _pool(self, x: Tensor) -> Tensor:
        geometry = self.geometry
        (top, bottom), (left, right) = pad = geometry.pad(tuple(x.shape[2:]))
        if geometry.dilation != (1, 1):
            return self._as_conv(x)
        inside = geometry.fill == 'zeros' and all(
            before == after <= size // 2
            for (before, after), size in zip(pad, geometry.kernel_size, strict=True)
        )
        if not inside:
            mode = 'constant' if geometry.fill == 'zeros' else geometry.fill
            x = F.pad(x, (left, right, top, bottom), mode=mode)
        return F.avg_pool2d(
            x, geometry.kernel_size, geometry.stride, (top, left) if inside else 0
        )

    def _as_conv(self, x: Tensor) -> Tensor:
        # A depthwise conv, unlike torch's average pooling, has dilation.
        taps = self.geometry.kernel_size
        weight = x.new_full((x.size(1), 1, *taps), 1 / (taps[0] * taps[1]))
        depthwise = replace(self.geometry, groups=x.size(1))
        return depthwise.convolve(x, weight, None)

    def extra_repr(self) -> str:
        return str(self.geometry)


@register_fold(DilatedAvgPool2d)
def _(layer: DilatedAvgPool2d, done: LinearConv) -> LinearConv:
    return done.then_average(layer.geometry)
