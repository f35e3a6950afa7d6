"""Squeeze-and-excitation."""

from collections.abc import Sequence

from mmcv.cnn import ConvModule
from mmengine.model import BaseModule
from torch import Tensor, nn


def make_divisible(value: int, divisor: int) -> int:
    """The multiple of ``divisor`` nearest to ``value``, at least 90 % of it."""
    nearest = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < 0.9 * value else nearest


class SELayer(BaseModule):
    """Scale every channel by a factor that two 1x1 convs compute from the channel means.

    ``y = x * act2(conv2(act1(conv1(mean(x)))))``. Arguments and state-dict keys are those
    of mmpretrain's layer of the same name.

    Source: `Squeeze-and-Excitation Networks <https://arxiv.org/abs/1709.01507>`_,
    section 3.

    Args:
        channels (int): Number of input and output channels.
        squeeze_channels (int, optional): Channels between the convs. Default: None,
            which means ``channels // ratio`` rounded to a multiple of ``divisor``.
        ratio (int): Squeeze ratio. Default: 16.
        divisor (int): See ``squeeze_channels``. Default: 8.
        bias (bool | str): Bias of the convs. Default: ``'auto'``, which means yes.
        conv_cfg (dict, optional): Config of the convs. Default: None, ``nn.Conv2d``.
        act_cfg (dict | Sequence[dict]): Config of both activations, or of each.
            Default: ReLU and Sigmoid.
        init_cfg (dict | list[dict], optional): Initialization. Default: None.
    """

    def __init__(
        self,
        channels: int,
        squeeze_channels: int | None = None,
        ratio: int = 16,
        divisor: int = 8,
        bias: bool | str = 'auto',
        conv_cfg: dict | None = None,
        act_cfg: dict | Sequence[dict] = (dict(type='ReLU'), dict(type='Sigmoid')),
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        first, second = (act_cfg, act_cfg) if isinstance(act_cfg, dict) else act_cfg
        squeezed = squeeze_channels or make_divisible(channels // ratio, divisor)
        self.global_avgpool = nn.AdaptiveAvgPool2d(1)
        common = dict(kernel_size=1, bias=bias, conv_cfg=conv_cfg)
        self.conv1 = ConvModule(channels, squeezed, act_cfg=first, **common)
        self.conv2 = ConvModule(squeezed, channels, act_cfg=second, **common)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to the same shape."""
        return x * self.conv2(self.conv1(self.global_avgpool(x)))
