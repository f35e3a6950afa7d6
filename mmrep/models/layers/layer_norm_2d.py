"""LayerNorm of feature maps."""

from torch import Tensor, nn


class LayerNorm2d(nn.LayerNorm):
    """Normalise every pixel by the mean and the variance of its channels.

    ``nn.LayerNorm`` for ``(N, C, H, W)``, with its arguments and state-dict keys.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to the same shape."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
