"""torch.export and TorchScript: both forms of every backbone, in eval mode."""

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
from laws import always_one_conv, assert_same, count_convs, image, randomise
from torch import Tensor, nn

from mmrep.models.backbones import (
    DBBVGG,
    DBBAlexNet,
    DBBMobileNetV1,
    DBBResNet,
    DBBResNetV1d,
    RepVGG,
)
from mmrep.models.backbones.resnet_blocks import BasicBlock, Bottleneck
from mmrep.reparam import branch_by_branch, switch_to_deploy

# Small ones, with each kind of block once: an exporter takes its time for every block.
ARCH = dict(num_blocks=(1, 2, 2, 1), width_factor=(0.125, 0.125, 0.0625, 0.0625))
RESNET = dict(
    base_channels=4,
    stem_channels=8,
    num_stages=2,
    strides=(1, 2),
    dilations=(1, 1),
    out_indices=(0, 1),
)


def shortened(network: type, **table: dict | tuple) -> type:
    """A backbone with fewer blocks in the table of its architectures."""
    return type(network.__name__, (network,), table)


BACKBONES = {
    'RepVGG': lambda: RepVGG(ARCH),
    'RepVGG with SE': lambda: RepVGG(dict(ARCH, se_cfg=dict(ratio=4))),
    'DBBResNet-18': lambda: shortened(DBBResNet, arch_settings={18: (BasicBlock, (2, 1))})(
        18, **RESNET
    ),
    'DBBResNet-50': lambda: shortened(DBBResNet, arch_settings={50: (Bottleneck, (2, 1))})(
        50, **RESNET
    ),
    'DBBResNetV1d-18': lambda: shortened(
        DBBResNetV1d, arch_settings={18: (BasicBlock, (1, 1))}
    )(depth=18, **RESNET),
    'DBBMobileNetV1': lambda: shortened(
        DBBMobileNetV1, layers=((64, 1), (128, 2), (256, 1), (512, 1), (1024, 1))
    )(width_factor=0.125),
    'DBBVGG': lambda: shortened(DBBVGG, arch_settings={11: (1, 1, 2, 1, 1)})(
        11, base_channels=4
    ),
    'DBBAlexNet': lambda: DBBAlexNet(flatten=True),
}
#: How the model computes while it is exported.
FORMS = {
    'train form, one conv': always_one_conv,
    'train form, branch by branch': branch_by_branch,
    'deploy form': nullcontext,
}


@functools.cache
def backbone(name: str) -> nn.Module:
    """A backbone in train form."""
    return randomise(BACKBONES[name]()).eval().requires_grad_(False)


def trace(model: nn.Module, x: Tensor) -> Callable:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return torch.jit.trace(model, x, check_trace=False)


def export(model: nn.Module, x: Tensor) -> Callable:
    return torch.export.export(model, (x,)).module()


old_torch = tuple(map(int, torch.__version__.split('.')[:2])) < (2, 5)
young = pytest.mark.skipif(old_torch, reason='torch.export is young there')


def cases() -> Iterator:
    """Networks and how they become a program, which takes seconds for each form."""
    for name in BACKBONES:
        often = [] if name in ('RepVGG with SE', 'DBBResNet-50') else [pytest.mark.long]
        yield pytest.param(name, trace, id=f'{name}-trace', marks=often)
        often = [] if name == 'RepVGG with SE' else [pytest.mark.long]
        yield pytest.param(name, export, id=f'{name}-export', marks=[young, *often])


@pytest.mark.parametrize('name, to_program', cases())
@pytest.mark.parametrize('form', FORMS)
def test_same_outputs(name, form, to_program):
    network = backbone(name)
    x, y = (image(1, 3, 96, 96, dtype=torch.float32, seed=seed) for seed in (1, 2))
    with branch_by_branch(network):
        expected = network(y)
        convs = count_convs(network, y)
    model = copy.deepcopy(network)
    if form == 'deploy form':
        switch_to_deploy(model)
    with FORMS[form](model):
        assert (count_convs(model, y) < convs) == (form != 'train form, branch by branch')
        program = to_program(model, x)
    assert_same(expected, program(y), tolerance=1e-5)
