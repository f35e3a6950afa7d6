import pytest
import torch
from laws import (
    assert_deploy_equivalent,
    assert_same,
    assert_same_step,
    image,
    randomise,
    step,
)
from torch import nn

from mmrep.models.backbones import (
    DBBVGG,
    ArchitectureError,
    DBBAlexNet,
    DBBMobileNetV1,
    RepVGG,
)
from mmrep.models.blocks import ConvNormBlock, DiverseBranchBlock, RepVGGBlock
from mmrep.reparam import count_parameters

REPVGG_BLOCK = dict(type='mmrep.RepVGGBlock')
#: Networks, the input's size and their number of Diverse Branch Blocks.
NETWORKS = {
    'VGG-11': (DBBVGG, dict(depth=11, base_channels=4), 32, 8),
    'VGG-16': (DBBVGG, dict(base_channels=2), 32, 13),
    'VGG-16 of RepVGG blocks': (
        DBBVGG,
        dict(base_channels=2, block_cfg=REPVGG_BLOCK),
        32,
        0,
    ),
    'plain VGG-13': (DBBVGG, dict(depth=13, base_channels=2, block_cfg=None), 32, 0),
    'AlexNet': (DBBAlexNet, dict(flatten=True), 64, 4),
    'MobileNet': (DBBMobileNetV1, dict(width_factor=0.125), 64, 14),
    'plain MobileNet': (DBBMobileNetV1, dict(width_factor=0.125, block_cfg=None), 32, 0),
    'MobileNet, 1x1 as well': (
        DBBMobileNetV1,
        dict(width_factor=0.125, reparam_kernels=(1, 3)),
        32,
        27,
    ),
}


@pytest.mark.parametrize('name', NETWORKS)
def test_deploy_form(name):
    network, options, size, count = NETWORKS[name]
    model = network(**options)
    assert sum(isinstance(m, DiverseBranchBlock) for m in model.modules()) == count
    deployed = assert_deploy_equivalent(model.double(), image(1, 3, size, size))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in deployed.modules())
    built = network(**options, deploy=True).double().eval()
    built.load_state_dict(deployed.state_dict())
    x = image(2, 3, size, size, seed=3)
    assert_same(deployed(x), built(x))


@pytest.mark.parametrize(
    ('network', 'options', 'train', 'deploy'),
    [(DBBMobileNetV1, {}, 414, 56), (DBBVGG, dict(block_cfg=None), None, 28)],
)
def test_keys(network, options, train, deploy):
    """With a head's two, as in the official checkpoints."""
    for form, keys in ((False, train), (True, deploy)):
        with torch.device('meta'):
            model = network(**options, deploy=form)
        if keys:
            assert len(model.state_dict()) + 2 == keys


def test_mobilenet_is_mobilenet():
    """4.23 M parameters with 1000 classes, or 4.21 M with BN fused."""
    with torch.device('meta'):
        model = DBBMobileNetV1(block_cfg=None)
    head = 1024 * 1000 + 1000
    assert round((count_parameters(model) + head) / 1e6, 2) == 4.23


@pytest.mark.parametrize('depth', DBBVGG.arch_settings)
def test_vgg_has_its_depth(depth):
    """Three linear layers are left out."""
    with torch.device('meta'):
        model = DBBVGG(depth, block_cfg=REPVGG_BLOCK)
    blocks = [m for m in model.modules() if isinstance(m, RepVGGBlock)]
    assert len(blocks) == depth - 3
    assert blocks[-1].out_channels == 512


@pytest.mark.parametrize(
    ('network', 'shapes'),
    [
        (DBBVGG, [(64, 16), (128, 8), (256, 4), (512, 2), (512, 1)]),
        (DBBMobileNetV1, [(64, 16), (128, 8), (256, 4), (512, 2), (1024, 1)]),
    ],
)
def test_outputs(network, shapes):
    with torch.device('meta'):
        model = network(out_indices=range(5))
        outputs = model(torch.empty(2, 3, 32, 32))
    assert [tuple(y.shape) for y in outputs] == [(2, c, s, s) for c, s in shapes]


@pytest.mark.parametrize(('flatten', 'shape'), [(False, (2, 256, 6, 6)), (True, (2, 9216))])
def test_alexnet_outputs(flatten, shape):
    with torch.device('meta'):
        model = DBBAlexNet(flatten=flatten, out_indices=(0, 2))
        first, last = model(torch.empty(2, 3, 224, 224))
    assert first.shape == (2, 64, 27, 27)
    assert last.shape == shape
    with torch.device('meta'):
        (earlier,) = DBBAlexNet(flatten=flatten, out_indices=(1,))(
            torch.empty(2, 3, 224, 224)
        )
    assert earlier.dim() == 4


def test_depthwise_blocks_of_mobilenet():
    with torch.device('meta'):
        model = DBBMobileNetV1()
    first, *others = [m for m in model.modules() if isinstance(m, DiverseBranchBlock)]
    assert not first.depthwise
    assert all(block.depthwise for block in others)
    plain = [m for m in model.modules() if isinstance(m, ConvNormBlock)]
    assert {block.kernel_size for block in plain} == {(1, 1)}


def test_with_cp_changes_nothing():
    x = image(4, 3, 32, 32)
    plain, saving = (
        randomise(DBBMobileNetV1(width_factor=0.125, with_cp=cp).double()) for cp in (0, 1)
    )
    assert_same_step(step(plain, x), step(saving, x))


@pytest.mark.parametrize('stages', [-1, 0, 1, 5])
def test_frozen_stages(stages):
    model = DBBVGG(11, base_channels=4, frozen_stages=stages)
    for _ in range(2):
        for i in range(1, 6):
            stage = getattr(model, f'stage_{i}')
            flags = {p.requires_grad for p in stage.parameters()}
            assert flags == {m.training for m in stage.modules()} == {i > stages}
        assert model.eval().train() is model


@pytest.mark.parametrize(
    ('build', 'message'),
    [
        (lambda: DBBVGG(12), r'depth 12 is unknown; choose from \(11, 13, 16, 19\)'),
        (lambda: DBBVGG(out_indices=(5,)), r'out_indices=\(5,\) of 5 stages'),
        (lambda: DBBAlexNet(out_indices=(3,)), r'out_indices=\(3,\) of 3 stages'),
        (lambda: DBBAlexNet(out_indices=(-1,)), r'out_indices=\(-1,\) of 3 stages'),
        (lambda: DBBAlexNet(out_indices=()), r'out_indices=\(\) of 3 stages: name one'),
    ],
    ids=['depth', 'out_indices', 'stages', 'negative', 'none'],
)
@pytest.mark.parametrize('error', [ArchitectureError, ValueError, AssertionError])
def test_refuses(build, message, error):
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize('cfg', [None, dict(type='mmrep.ConvNormBlock')])
def test_a_plain_repvgg(cfg):
    """A body becomes its plain network by the block that it is told, or not told."""
    arch = dict(num_blocks=(1, 2), width_factor=(1, 1))
    model = RepVGG(arch, base_channels=4, out_indices=(1,), block_cfg=cfg)
    kinds = {type(m) for m in model.modules() if hasattr(m, 'branch_names')}
    assert kinds == {ConvNormBlock}
