"""The blocks of OREPA's authors, with the names of their code.

Written from the paper and the names in the published weights, for comparison.
"""

import math

import torch
import torch.nn.functional as F
from official_repvgg import conv_bn
from torch import Tensor, nn


def parameter(*shape: int) -> nn.Parameter:
    """Weights that are random; the tests draw the norms alone."""
    return nn.Parameter(torch.randn(shape) / math.sqrt(math.prod(shape[1:])))


def cosines(channels: int) -> Tensor:
    """The frequency prior of 3x3 kernels."""
    prior = torch.empty(channels, 3, 3)
    for i in range(channels):
        half = channels / 2
        along_rows = i < half
        frequency = i + 1 if along_rows else i + 1 - half
        wave = [math.cos(math.pi * (place + 0.5) * frequency / 3) for place in range(3)]
        wave = torch.tensor(wave)
        prior[i] = wave[:, None] if along_rows else wave[None, :]
    return prior


#: The branches in the order of their scales; OREPA-RepVGG's have no 1x1.
BRANCHES = ('origin', 'avg', 'prior', '1x1_kxk', '1x1', 'separable')
REPVGG_BRANCHES = ('origin', 'avg', 'prior', '1x1_kxk', 'separable')


def add_weights(
    module: nn.Module, ins: int, outs: int, prefix: str, rows: int = len(BRANCHES)
) -> None:
    """Give a module what a 3x3 kernel is generated from.

    Args:
        module: The module.
        ins, outs: Numbers of channels.
        prefix: What the names of weights begin with.
        rows: Number of scales for each channel.
    """
    for name, shape in {
        'origin': (outs, ins, 3, 3),
        'avg_conv': (outs, ins, 1, 1),
        'pfir_conv': (outs, ins, 1, 1),
        '1x1_kxk_idconv1': (ins, ins, 1, 1),
        '1x1_kxk_conv2': (outs, ins, 3, 3),
        'gconv_dw': (8 * ins, 1, 3, 3),
        'gconv_pw': (outs, 8 * ins, 1, 1),
    }.items():
        module.register_parameter(f'{prefix}{name}', parameter(*shape))
    module.register_buffer(f'{prefix}avg_avg', torch.full((3, 3), 1 / 9))
    module.register_buffer(f'{prefix}prior', cosines(outs))
    module.register_buffer('id_tensor', torch.eye(ins)[:, :, None, None])
    module.vector = parameter(rows, outs)


def generate(module: nn.Module, prefix: str, branches: tuple[str, ...]) -> Tensor:
    """The 3x3 kernel of such weights: the sum of scaled branches."""

    def get(name: str) -> Tensor:
        return getattr(module, f'{prefix}{name}')

    outs, ins = get('origin').shape[:2]
    first = (get('1x1_kxk_idconv1') + module.id_tensor)[:, :, 0, 0]
    depthwise = get('gconv_dw').view(ins, 8, 3, 3)
    pointwise = get('gconv_pw').view(outs, ins, 8)
    kernels = {
        'origin': get('origin'),
        'avg': get('avg_conv') * get('avg_avg'),
        'prior': get('pfir_conv') * get('prior')[:, None],
        '1x1_kxk': torch.einsum('otyx,ti->oiyx', get('1x1_kxk_conv2'), first),
        'separable': torch.einsum('oie,ieyx->oiyx', pointwise, depthwise),
    }
    if '1x1' in branches:
        kernels['1x1'] = F.pad(get('1x1'), [1] * 4)
    scales = zip(module.vector, branches, strict=False)
    return sum(scale[:, None, None, None] * kernels[name] for scale, name in scales)


class Generated(nn.Module):
    """A 3x3 kernel that is a part of another one."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        add_weights(self, ins, outs, 'weight_orepa_')
        self.weight_orepa_1x1 = parameter(outs, ins, 1, 1)

    def kernel(self) -> Tensor:
        return generate(self, 'weight_orepa_', BRANCHES)


class GeneratedRepVGG(nn.Module):
    """The 3x3 branch of an OREPA-RepVGG; one more scale stands for the identity."""

    def __init__(self, ins: int, outs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        rows = len(REPVGG_BRANCHES) + (ins == outs and stride == 1)
        add_weights(self, ins, outs, 'weight_rbr_', rows)
        self.bn = nn.BatchNorm2d(outs)

    def forward(self, x: Tensor) -> Tensor:
        kernel = generate(self, 'weight_rbr_', REPVGG_BRANCHES)
        return self.bn(F.conv2d(x, kernel, stride=self.stride, padding=1))


class Unit(nn.Module):
    """A conv of a kernel that is generated, a norm and an activation."""

    deployed: str

    def __init__(
        self, ins: int, outs: int, size: int, stride: int, deploy: bool, relu: bool
    ) -> None:
        super().__init__()
        self.stride, self.relu, self.padding = stride, relu, size // 2
        if deploy:
            conv = nn.Conv2d(ins, outs, size, stride, size // 2)
            self.add_module(self.deployed, conv)
        else:
            self.bn = nn.BatchNorm2d(outs)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, self.deployed):
            out = getattr(self, self.deployed)(x)
        else:
            out = F.conv2d(x, self.kernel(), stride=self.stride, padding=self.padding)
            out = self.bn(out)
        return out.relu() if self.relu else out


class OREPA(Unit):
    """A 3x3 unit."""

    deployed = 'orepa_reparam'

    def __init__(
        self,
        ins: int,
        outs: int,
        stride: int = 1,
        deploy: bool = False,
        relu: bool = True,
    ) -> None:
        super().__init__(ins, outs, 3, stride, deploy, relu)
        if not deploy:
            add_weights(self, ins, outs, 'weight_orepa_')
            self.weight_orepa_1x1 = parameter(outs, ins, 1, 1)

    def kernel(self) -> Tensor:
        return generate(self, 'weight_orepa_', BRANCHES)


class OREPA1x1(Unit):
    """A 1x1 unit: a conv, and two in a row."""

    deployed = 'or1x1_reparam'

    def __init__(
        self,
        ins: int,
        outs: int,
        size: int = 1,
        stride: int = 1,
        deploy: bool = False,
        relu: bool = True,
    ) -> None:
        super().__init__(ins, outs, size, stride, deploy, relu)
        if deploy:
            return
        between = min(ins, outs)
        self.weight_or1x1_origin = parameter(outs, ins, 1, 1)
        self.weight_or1x1_l2i_conv1 = parameter(between, ins, 1, 1)
        self.weight_or1x1_l2i_conv2 = parameter(outs, between, 1, 1)
        self.vector = parameter(2, outs)

    def kernel(self) -> Tensor:
        first, second = self.weight_or1x1_l2i_conv1, self.weight_or1x1_l2i_conv2
        both = (second[:, :, 0, 0] @ first[:, :, 0, 0])[:, :, None, None]
        scales = self.vector[:, :, None, None, None]
        return scales[0] * self.weight_or1x1_origin + scales[1] * both


class OREPALarge(Unit):
    """The 7x7 unit of a stem: three 3x3 kernels, each correlated with the one before."""

    deployed = 'or_large_reparam'

    def __init__(
        self, ins: int, outs: int, size: int = 7, stride: int = 2, deploy: bool = False
    ) -> None:
        super().__init__(ins, outs, size, stride, deploy, relu=True)
        if not deploy:
            self.weight0 = Generated(ins, outs)
            self.weight1 = Generated(outs, outs)
            self.weight2 = Generated(outs, outs)

    def kernel(self) -> Tensor:
        kernel = self.weight0.kernel()
        for following in (self.weight1.kernel(), self.weight2.kernel()):
            size = kernel.shape[-1] + 2
            longer = kernel.new_zeros(len(following), kernel.shape[1], size, size)
            for y in range(3):
                for x in range(3):
                    part = torch.einsum('ot,tiyx->oiyx', following[:, :, y, x], kernel)
                    rows = slice(2 - y, size - y)
                    longer[:, :, rows, 2 - x : size - x] += part
            kernel = longer
        return kernel


class OREPARepVGGBlock(nn.Module):
    """A block of OREPA-RepVGG."""

    def __init__(self, ins: int, outs: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        assert groups == 1
        self.rbr_identity = nn.BatchNorm2d(ins) if ins == outs and stride == 1 else None
        self.rbr_dense = GeneratedRepVGG(ins, outs, stride)
        self.rbr_1x1 = conv_bn(nn.Conv2d(ins, outs, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out = self.rbr_dense(x) + self.rbr_1x1(x)
        if self.rbr_identity is not None:
            out = out + self.rbr_identity(x)
        return out.relu()
