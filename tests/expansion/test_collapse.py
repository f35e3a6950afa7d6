import copy

import pytest
import torch
from detectors import faster_rcnn, retinanet
from laws import assert_same, image, randomise
from mmengine.config import ConfigDict
from mmengine.registry import MODELS
from processes import run_python
from test_expand import DBB, REPVGG, Net, X, outputs, step
from torch import Tensor, nn

from mmrep.expansion import collapse, expand
from mmrep.expansion.place import MovedNorm, places
from mmrep.hosts import forward
from mmrep.models.blocks import ReparamBlock
from mmrep.reparam import (
    NotFoldableError,
    branch_by_branch,
    flatten_outputs,
    switch_to_deploy,
)


@pytest.fixture
def trained() -> Net:
    """An expanded network, no longer what it was."""
    model = randomise(Net())
    y = outputs(model)
    expand(model, DBB, X)
    step(model)
    assert (outputs(model) - y).norm() > 1e-3 * y.norm()
    return model


class TestCollapse:
    def test_same_function_of_the_plain_classes(self, trained):
        expected = outputs(trained)
        convs = collapse(trained)
        assert sorted(convs) == ['stages.0.body.0', 'stages.0.conv2', 'stages.0.conv3']
        assert str(trained) == str(Net()) and not list(places(trained))
        assert_same(expected, outputs(trained), 2e-6)
        plain = Net()
        plain.load_state_dict(trained.state_dict(), strict=True)
        assert torch.equal(outputs(plain), outputs(trained))

    def test_in_double_precision(self):
        model = randomise(Net().double())
        expand(model, DBB, X.double())
        step(model, X.double())
        expected = outputs(model, X.double())
        collapse(model)
        assert_same(expected, outputs(model, X.double()), 1e-12)

    def test_can_be_expanded_again(self, trained):
        expected = outputs(trained)
        collapse(trained)
        expand(trained, REPVGG, X)
        step(trained)
        collapse(trained)
        assert (outputs(trained) - expected).norm() > 1e-3 * expected.norm()

    def test_at_once_is_the_plain_network(self):
        model = randomise(Net())
        before = outputs(model)
        expand(model, DBB, X)
        collapse(model)
        assert_same(before, outputs(model), 1e-6)

    def test_of_a_copy(self, trained):
        copied = copy.deepcopy(trained)
        expected = outputs(trained)
        collapse(copied)
        assert torch.equal(outputs(trained), expected)
        assert_same(expected, outputs(copied), 2e-6)

    def test_nothing_expanded(self):
        with pytest.raises(ValueError, match=r'no block that stands for a conv'):
            collapse(Net())

    def test_in_deploy_form(self, trained):
        expected = outputs(trained)
        switch_to_deploy(trained)
        assert_same(expected, outputs(trained), 2e-6)
        with pytest.raises(ValueError, match=r'^stages\.0\.\w+\S* is in deploy form'):
            collapse(trained)

    def test_what_cannot_be_folded(self, trained):
        trained.stages[0].conv3.branch_avg.norm2 = nn.GroupNorm(2, 4)
        before = str(trained)
        with pytest.raises(NotFoldableError, match=r'^stages\.0\.conv3\.branch_avg'):
            collapse(trained)
        assert str(trained) == before


class TestMovedNorm:
    """What a network does with the norm that was there."""

    def test_mode(self, trained):
        moved, block = trained.stages[0].body[1], trained.stages[0].body[0]
        trained.train()
        assert all(m.training for m in block.modules())
        moved.eval()
        norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
        assert len(norms) == 6 and not any(m.training for m in norms)
        trained.eval()
        moved.train()
        assert all(m.training for m in norms)

    def test_initialization(self, trained):
        moved, block = trained.stages[0].body[1], trained.stages[0].body[0]
        nn.init.zeros_(moved.weight)
        nn.init.constant_(moved.bias, 2)
        assert not block.branch_kxk.norm.weight.any()
        assert (block.branch_kxk.norm.bias == 2).all()
        assert trained.stages[0].norm2.weight is None
        switch_to_deploy(trained)
        assert moved.weight is None and moved.bias is None
        moved.train()

    def test_has_no_tensors(self, trained):
        moved = trained.stages[0].body[1]
        assert type(moved) is MovedNorm and not moved.state_dict()
        assert not list(moved.modules())[1:]


def seg(head: str, **options) -> dict:
    return dict(
        type='EncoderDecoder',
        backbone=dict(type='ResNetV1c', depth=18, base_channels=8),
        decode_head=dict(
            type=head,
            channels=16,
            num_classes=3,
            norm_cfg=dict(type='BN'),
            loss_decode=dict(type='CrossEntropyLoss'),
            **options,
        ),
        train_cfg=dict(),
        test_cfg=dict(mode='whole'),
    )


LAST = dict(in_channels=64, in_index=3)
ALL = dict(in_channels=[8, 16, 32, 64], in_index=[0, 1, 2, 3])
DILATED = dict(dilations=(1, 2, 3), c1_in_channels=8, c1_channels=4)

#: Networks of the hosts, and how many of their convs are replaced.
HOSTS = {
    'ResNet-50': (dict(type='ResNet', depth=50), 17),
    'ResNeXt-50': (dict(type='ResNeXt', depth=50), 17),
    'MobileNetV2': (dict(type='MobileNetV2'), 18),
    'MobileNetV3': (dict(type='MobileNetV3', arch='large'), 16),
    'RegNet': (dict(type='RegNet', arch='regnetx_400mf'), 23),
    'HRNet-W18': (dict(type='HRNet', arch='w18'), 265),
    'EfficientNet-B0': (dict(type='EfficientNet', arch='b0'), 12),
    'ShuffleNetV2': (dict(type='ShuffleNetV2'), 20),
    'ConvNeXt-T': (dict(type='ConvNeXt', arch='tiny'), 18),
    'InceptionV3': (dict(type='InceptionV3', aux_logits=False), 20),
    'CSPDarkNet': (dict(type='CSPDarkNet', depth=53), 29),
    'FCN': (seg('FCNHead', num_convs=2, **LAST), 22),
    'PSPNet': (seg('PSPHead', pool_scales=(1, 2), **LAST), 20),
    'DeepLabV3+': (seg('DepthwiseSeparableASPPHead', **DILATED, **LAST), 24),
    'UPerNet': (seg('UPerHead', pool_scales=(1, 2), **ALL), 24),
    'RetinaNet': (retinanet(), 30),
    'Faster R-CNN': (faster_rcnn(), 20),
}
ALWAYS = {'MobileNetV2', 'ConvNeXt-T', 'UPerNet', 'RetinaNet'}


def scope_of(config: dict) -> str:
    hosts = dict(decode_head='mmseg', bbox_head='mmdet', roi_head='mmdet')
    return next((hosts[key] for key in hosts if key in config), 'mmpretrain')


def build(config: dict) -> nn.Module:
    pytest.importorskip(scope_of(config))
    with MODELS.switch_scope_and_registry(scope_of(config)) as models:
        model = randomise(models.build(ConfigDict(copy.deepcopy(config))))
    # mmpretrain's backbones return nothing.
    model.eval()
    return model


def run(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Its outputs."""
    return list(flatten_outputs(forward(model, x)).values())


@pytest.mark.parametrize(
    'name',
    [n if n in ALWAYS else pytest.param(n, marks=pytest.mark.long) for n in HOSTS],
)
def test_networks_of_the_hosts(name):
    config, count = HOSTS[name]
    plain = build(config)
    model = copy.deepcopy(plain)
    x = image(2, 3, 96, 96, dtype=torch.float32)
    done = expand(model, DBB, lambda model: run(model, x), kernel_sizes=(3, 5, 7))
    assert len(done.replaced) == count
    model.eval()
    with torch.no_grad(), branch_by_branch(model):
        assert_same(run(plain, x), run(model, x), 1e-6)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    sum(y.square().mean() for y in run(model, x)).backward()
    branches = [
        branch
        for block in model.modules()
        if isinstance(block, ReparamBlock)
        for branch in block.branches().values()
    ]
    assert all(any(p.grad.any() for p in branch.parameters()) for branch in branches)
    optimizer.step()
    model.eval()
    with torch.no_grad(), branch_by_branch(model):
        expected = run(model, x)
    collapse(model)
    plain.load_state_dict(model.state_dict(), strict=True)
    assert str(plain) == str(model)
    with torch.no_grad():
        # Of the dozens of layers, each rounds.
        assert_same(expected, run(plain, x), 1e-5)


STOCK = """
import sys
sys.modules['mmrep'] = None
import torch
from mmengine.registry import MODELS
scope, config, state, x, expected = torch.load(sys.argv[1], weights_only=True)
with MODELS.switch_scope_and_registry(scope) as models:
    model = models.build(config).double()
model.eval()
model.load_state_dict(state, strict=True)
with torch.no_grad():
    output = model(x)[-1] if scope == 'mmpretrain' else model(x, mode='tensor')
    output = output[-1][-1] if scope == 'mmdet' else output
assert not [name for name in sys.modules if name.startswith('mmrep.')]
print(((output - expected).norm() / expected.norm()).item())
"""


@pytest.mark.parametrize(
    'name',
    [
        'MobileNetV2',
        pytest.param('UPerNet', marks=pytest.mark.long),
        pytest.param('RetinaNet', marks=pytest.mark.long),
    ],
)
def test_where_mmrep_is_not_installed(tmp_path, name):
    config, _ = HOSTS[name]
    # Two processes need not take the same algorithms: float32 differs by 3e-6.
    model, x = build(config).double(), image(1, 3, 64, 64)
    expand(model, REPVGG, lambda model: run(model, x))
    randomise(model, seed=1)
    collapse(model)
    with torch.no_grad():
        *_, expected = run(model, x)
    saved = scope_of(config), config, dict(model.state_dict()), x, expected
    torch.save(saved, tmp_path / 'a.pth')
    done = run_python('-c', STOCK, tmp_path / 'a.pth', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) < 1e-12


#: Every block, and the kernels of :class:`Net` that it is for.
BLOCKS = {
    'AsymmetricConvBlock': {},
    'BranchBlock': dict(branches=('kxk', '1x3', 'avg', dict(kernel_size=3, dilation=1))),
    'DilatedReparamBlock': dict(kernels=((3, 1), (1, 1))),
    'LargeKernelBlock': dict(small_kernel=3),
    'MobileOneBlock': dict(num_convs=2),
    'OREPABlock': {},
    'OREPARepVGGBlock': {},
    'QARepVGGBlock': dict(average=True),
}


@pytest.mark.parametrize('name', BLOCKS)
def test_every_block(name):
    """Expanded, the same function; trained and collapsed, the plain network's."""
    model = randomise(Net())
    plain = copy.deepcopy(model.state_dict())
    before = outputs(model)
    expand(model, dict(type=f'mmrep.{name}', **BLOCKS[name]), X)
    assert {type(b).__name__ for b in model.modules() if isinstance(b, ReparamBlock)} >= {
        name
    }
    assert_same(before, outputs(model), 1e-6)
    fresh = copy.deepcopy(model)
    step(model)
    expected = outputs(model)
    assert (expected - before).norm() > 1e-3 * before.norm()
    own = copy.deepcopy(model.state_dict())
    collapse(model)
    assert_same(expected, outputs(model), 2e-6)
    stock = Net()
    stock.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(outputs(stock), outputs(model))
    # Both kinds of checkpoints load into the expanded network.
    fresh.load_state_dict(own, strict=True)
    assert_same(expected, outputs(fresh), 1e-6)
    fresh.load_state_dict(plain, strict=True)
    assert_same(before, outputs(fresh), 1e-6)
