"""The fixed filters of OREPA's frequency prior."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from mmrep.reparam import ConvGeometry, LinearConv, register_fold


class CosineFilters(nn.Module):
    """A depthwise conv with fixed kernels: cosines over the rows, or over the columns.

    ``P[i, r, c] = cos(pi (r + 1/2) (i + 1) / kh)`` for the i-th channel of the first half;
    ``P[i, r, c] = cos(pi (c + 1/2) (i + 1) / kw)`` for the i-th channel of the other half.

    Source: `Online Convolutional Re-parameterization <https://arxiv.org/abs/2204.00826>`_,
    section 3.2 ("frequency prior"), and its code, where ``kh = kw = 3``.

    Args:
        geometry (ConvGeometry): Input channels, kernel size, stride, padding, dilation and
            padding mode of the conv. Its groups and output channels are not used.
    """

    def __init__(self, geometry: ConvGeometry) -> None:
        super().__init__()
        channels = geometry.in_channels
        self.geometry = replace(geometry, out_channels=channels, groups=channels)

    def kernel(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The fixed kernels ``(channels, 1, kh, kw)``."""
        channels, taps = self.geometry.in_channels, self.geometry.kernel_size
        half = channels // 2
        filters = []
        for count, size in zip((half, channels - half), taps, strict=True):
            # In float64: half precision has few digits, and no cosine on some devices.
            frequency = torch.arange(1, count + 1, dtype=torch.float64, device=device)
            place = torch.arange(size, dtype=torch.float64, device=device) + 0.5
            filters.append(torch.cos(torch.pi / size * frequency[:, None] * place))
        rows, columns = filters
        kernels = (
            rows[:, None, :, None].expand(-1, 1, *taps),
            columns[:, None, None, :].expand(-1, 1, *taps),
        )
        return torch.cat(kernels).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, C, H', W')``."""
        return self.geometry.convolve(x, self.kernel(x.dtype, x.device), None)

    def extra_repr(self) -> str:
        return str(self.geometry)


@register_fold(CosineFilters)
def _(layer: CosineFilters, partial: LinearConv) -> LinearConv:
    return partial.then_conv(
        layer.kernel(partial.dtype, partial.device), None, layer.geometry
    )
