"""Average pooling with the geometry of any conv."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmrep.reparam import ConvGeometry, LinearConv, register_fold


class DilatedAvgPool2d(nn.Module):
    """Average over the taps of a conv: ``nn.AvgPool2d`` with dilation and padding modes.

    ``y = conv(x, 1 / (kh kw))`` on every channel; the mean includes the padding.

    Args:
        geometry (ConvGeometry): Input channels, kernel size, stride, padding, dilation and
            padding mode of the conv whose taps are averaged. Its groups and output channels
            are not used.
    """

    def __init__(self, geometry: ConvGeometry) -> None:
        super().__init__()
        self.geometry = geometry

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, C, H', W')``."""
        geometry, taps = self.geometry, self.geometry.kernel_size
        pools = geometry.dilation == (1, 1) and geometry.padding_mode == 'zeros'
        pools &= all(2 * p <= k for p, k in zip(geometry.padding, taps, strict=True))
        # On a CPU a depthwise conv takes a half to a tenth of the time of torch's pooling.
        # In half precision, 1 / (kh kw) is not exact enough for that, and an exported graph
        # should show a pooling.
        fast_conv = x.device.type == 'cpu' and x.dtype in (torch.float32, torch.float64)
        exported = torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()
        if pools and (exported or not fast_conv):
            return F.avg_pool2d(x, taps, geometry.stride, geometry.padding)
        channels = geometry.in_channels
        weight = x.new_full((channels, 1, *taps), 1 / (taps[0] * taps[1]))
        # The meta device has no autocast of its own.
        with torch.autocast('cpu' if x.is_meta else x.device.type, enabled=False):
            return replace(geometry, groups=channels).convolve(x, weight, None)

    def extra_repr(self) -> str:
        return str(self.geometry)


@register_fold(DilatedAvgPool2d)
def _(layer: DilatedAvgPool2d, partial: LinearConv) -> LinearConv:
    return partial.then_average(layer.geometry)
