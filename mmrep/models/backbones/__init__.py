"""Backbones: bodies that build their blocks from a config."""

from .base import ArchitectureError, ReparamBackbone
from .chain import DBBVGG, ChainBackbone, DBBAlexNet, DBBMobileNetV1
from .mobileone import MobileOne
from .replknet import RepLKNet
from .repopt_vgg import RepOptVGG
from .repvgg import RepVGG
from .resnet import DBBResNet, DBBResNetV1c, DBBResNetV1d, ReparamResNet
from .unireplknet import UniRepLKNet

__all__ = [
    'DBBVGG',
    'ArchitectureError',
    'ChainBackbone',
    'DBBAlexNet',
    'DBBMobileNetV1',
    'DBBResNet',
    'DBBResNetV1c',
    'DBBResNetV1d',
    'MobileOne',
    'RepLKNet',
    'RepOptVGG',
    'RepVGG',
    'ReparamBackbone',
    'ReparamResNet',
    'UniRepLKNet',
]
