"""Global response normalisation."""

import torch
from torch import Tensor, nn


class GRN(nn.Module):
    """``y = x (gamma n(x) + 1)``, where ``n`` compares a channel with all others.

    ``n(x)_c = g_c / (mean_c(g) + eps)``, and ``g_c`` is the Euclidean norm of channel
    ``c``'s map. Starts as the identity.

    Source: `ConvNeXt V2 <https://arxiv.org/abs/2301.00808>`_, section 3.2 and algorithm 1.
    The paper's bias, ``beta``, is left to the layer that follows.

    Args:
        channels (int): Number of channels.
        eps (float): Keeps the quotient finite. Default: 1e-6.
    """

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.gamma = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to the same shape."""
        response = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
        response = response / (response.mean(1, keepdim=True) + self.eps)
        return x * (self.gamma.view(-1, 1, 1) * response + 1)
