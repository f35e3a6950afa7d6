"""The pyramid pooling at the end of YOLOX-PAI's RepVGG."""

import torch
from mmcv.cnn import ConvModule
from mmengine.model import BaseModule
from torch import Tensor, nn


class MTSPPF(BaseModule):
    """Max pooling once, twice and three times, between two 1x1 convs.

    ``y = conv2(cat(u, pool(u), pool(pool(u)), pool(pool(pool(u)))))``, ``u = conv1(x)``.
    Arguments and state-dict keys are those of mmpretrain's layer of the same name.

    Source: `YOLOX-PAI <https://arxiv.org/abs/2208.13040>`_, section 2.2.

    Args:
        in_channels (int): Number of input channels.
        out_channels (int): Number of output channels.
        norm_cfg (dict): Config of the norms. Default: ``dict(type='BN')``.
        act_cfg (dict): Config of the activations. Default: ``dict(type='ReLU')``.
        kernel_size (int): Kernel size of the pooling. Default: 5.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm_cfg: dict = dict(type='BN'),
        act_cfg: dict = dict(type='ReLU'),
        kernel_size: int = 5,
    ) -> None:
        super().__init__()
        hidden = in_channels // 2
        cfg = dict(norm_cfg=norm_cfg, act_cfg=act_cfg)
        self.conv1 = ConvModule(in_channels, hidden, 1, **cfg)
        self.conv2 = ConvModule(hidden * 4, out_channels, 1, **cfg)
        self.maxpool = nn.MaxPool2d(kernel_size, stride=1, padding=kernel_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in_channels, H, W)`` to ``(N, out_channels, H, W)``."""
        pooled = [self.conv1(x)]
        for _ in range(3):
            pooled.append(self.maxpool(pooled[-1]))
        return self.conv2(torch.cat(pooled, 1))
