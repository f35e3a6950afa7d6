"""``conv_cfg=dict(type='mmrep.DBBConv2d')`` in the networks of hosts."""

from importlib import import_module

import pytest
import torch
from laws import assert_same, image, randomise
from mmcv.cnn import ConvModule, build_conv_layer
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import load_state_dict as load_by_mmengine
from tiny_projects import segmentor_model
from torch import nn

from mmrep.expansion import CONV_LAYERS, collapse, norms_after
from mmrep.models.blocks import (
    AsymmetricConvBlock,
    BranchBlock,
    DilatedReparamBlock,
    DiverseBranchBlock,
    LargeKernelBlock,
    MobileOneBlock,
    OREPABlock,
    OREPARepVGGBlock,
    QARepVGGBlock,
    ReparamBlock,
    RepVGGBlock,
)
from mmrep.reparam import branch_by_branch, switch_to_deploy

LAYERS = {
    'mmrep.ACBConv2d': AsymmetricConvBlock,
    'mmrep.BranchConv2d': BranchBlock,
    'mmrep.DBBConv2d': DiverseBranchBlock,
    'mmrep.MobileOneConv2d': MobileOneBlock,
    'mmrep.OREPAConv2d': OREPABlock,
    'mmrep.OREPARepVGGConv2d': OREPARepVGGBlock,
    'mmrep.QARepVGGConv2d': QARepVGGBlock,
    'mmrep.RepVGGConv2d': RepVGGBlock,
}
X = image(1, 3, 32, 32, dtype=torch.float32)
#: What ConvModule and initializers read.
READ = (
    *('in_channels', 'out_channels', 'kernel_size', 'stride', 'padding', 'dilation'),
    *('groups', 'transposed', 'output_padding', 'padding_mode'),
)
every_layer = pytest.mark.parametrize('name', LAYERS)


def segmentor(conv_cfg: dict | None) -> nn.Module:
    """A backbone and a head of such convs, each with a norm after it."""
    backbone = dict(type='ResNetV1c', depth=18, base_channels=4, conv_cfg=conv_cfg)
    config = segmentor_model(dict(backbone, out_indices=(3,)), 32)
    config['decode_head']['conv_cfg'] = conv_cfg
    with DefaultScope.overwrite_default_scope('mmseg'):
        # In float32 what 20 convs round depends on the kind of CPU.
        return randomise(MODELS.build(config).double()).eval()


def run(model: nn.Module) -> torch.Tensor:
    with torch.no_grad(), branch_by_branch(model):
        return model(X.double(), mode='tensor')


@every_layer
class TestConvLayer:
    @pytest.mark.parametrize(
        'options',
        [
            {},
            dict(stride=2, padding=1, bias=False),
            dict(padding=2, dilation=2, groups=2),
            dict(padding=(0, 1), padding_mode='reflect'),
        ],
        ids=str,
    )
    def test_starts_as_the_conv_and_has_what_it_has(self, name, options):
        block = build_conv_layer(dict(type=name), 4, 6, 3, **options)
        assert type(block) is LAYERS[name]
        conv = nn.Conv2d(4, 6, 3, **options)
        for attribute in READ:
            assert getattr(block, attribute) == getattr(conv, attribute), attribute
        assert block.weight.shape == conv.weight.shape
        assert (block.bias is None) == (conv.bias is None)
        block.load_state_dict(conv.state_dict(), strict=True)
        x = image(2, 4, 9, 8, dtype=torch.float32)
        assert_same(conv(x), block.eval()(x), 1e-6)
        assert_same(conv.weight, block.equivalent_kernel_bias()[0], 1e-6)
        assert len(block.branches()) > 1

    def test_as_nn_conv2d_is_called(self, name):
        block = build_conv_layer(dict(type=name), 4, 4, 3, 2, 1, bias=False)
        assert (block.stride, block.padding, block.bias) == ((2, 2), (1, 1), None)
        block = build_conv_layer(
            dict(type=name), in_channels=4, out_channels=4, kernel_size=(3, 3), padding=1
        )
        assert block.padding == (1, 1) and block.bias.shape == (4,)

    def test_other_kernels_are_plain_convs(self, name):
        for size in (1, 7, (1, 3)):
            assert type(build_conv_layer(dict(type=name), 4, 4, size)) is nn.Conv2d

    def test_options_of_the_block(self, name):
        cfg = dict(type=name, norm_cfg=dict(type='BN', eps=0.5), conv_cfg=dict(type='Conv'))
        block = build_conv_layer(cfg, 4, 4, 3)
        norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
        assert all(norm.eps == 0.5 for norm in norms)
        assert type(block.main_conv) is not nn.Conv2d
        with pytest.raises(TypeError, match='leave act_cfg and se_cfg out'):
            build_conv_layer(dict(type=name, act_cfg=dict(type='ReLU')), 4, 4, 3)

    def test_in_deploy_form(self, name):
        block = randomise(build_conv_layer(dict(type=name), 4, 4, 3, padding=1)).eval()
        x = image(2, 4, 9, 8, dtype=torch.float32)
        with branch_by_branch(block):
            expected = block(x)
        block.switch_to_deploy()
        assert_same(expected, block(x), 1e-5)
        assert block.weight is block.branch_reparam.weight
        assert block.bias is block.branch_reparam.bias

    def test_conv_module(self, name):
        module = ConvModule(4, 4, 3, conv_cfg=dict(type=name), norm_cfg=dict(type='BN'))
        assert isinstance(module.conv, ReparamBlock) and module.conv.bias is None
        assert module(image(2, 4, 5, 5, dtype=torch.float32)).shape == (2, 4, 3, 3)

    def test_network_and_back(self, name):
        plain, model = segmentor(None), segmentor(dict(type=name))
        assert sum(type(m) is LAYERS[name] for m in model.modules()) == 20
        for load in (nn.Module.load_state_dict, load_by_mmengine):
            randomise(model)
            load(model, plain.state_dict(), strict=True)
            assert_same(run(plain), run(model), 1e-12)
        randomise(model, seed=1).eval()
        expected = run(model)
        assert (expected - run(plain)).norm() > 1e-3 * expected.norm()
        norms = collapse(model, run)
        assert norms['backbone.stem.0'] == 'backbone.stem.1'
        assert norms['decode_head.convs.0.conv'] == 'decode_head.convs.0.bn'
        plain.load_state_dict(model.state_dict(), strict=True)
        assert str(plain) == str(model)
        assert_same(expected, run(plain), 1e-10)

    def test_norm_without_a_bias(self, name):
        conv = build_conv_layer(dict(type=name), 3, 4, 3, bias=False)
        model = randomise(nn.Sequential(conv, nn.BatchNorm2d(4, affine=False))).eval()
        expected = model(X)
        assert collapse(model, X) == {'0': '1'}
        assert [type(m) for m in model] == [nn.Conv2d, nn.BatchNorm2d]
        assert_same(expected, model(X), 1e-5)

    def test_bias_of_the_conv(self, name):
        model = randomise(nn.Sequential(build_conv_layer(dict(type=name), 3, 4, 3))).eval()
        expected = model(X)
        assert collapse(model) == {'0': None}
        assert_same(expected, model(X), 1e-5)

    def test_nowhere_for_a_bias(self, name):
        conv = build_conv_layer(dict(type=name), 3, 4, 3, bias=False)
        model = nn.Sequential(conv, nn.ReLU(), nn.BatchNorm2d(4))
        with pytest.raises(ValueError, match=r'^0 has no bias: give an example'):
            collapse(model)
        with pytest.raises(
            ValueError, match=r'^0 has no bias, and no norm after it .* relu'
        ):
            collapse(model, X)
        assert model[0] is conv

    def test_one_layer_of_several_names(self, name):
        conv = build_conv_layer(dict(type=name), 3, 3, 3, padding=1)
        model = randomise(nn.Sequential(conv, nn.ReLU(), conv)).eval()
        expected = model(X)
        collapse(model)
        assert type(model[0]) is nn.Conv2d and model[2] is model[0]
        assert_same(expected, model(X), 1e-5)

    def test_alone(self, name):
        block = build_conv_layer(dict(type=name), 3, 4, 3)
        with pytest.raises(ValueError, match='the model is one block'):
            collapse(block)

    def test_deployed_ones_need_no_norm(self, name):
        conv = build_conv_layer(dict(type=name), 3, 4, 3, bias=False)
        model = nn.Sequential(conv, nn.BatchNorm2d(4)).eval()
        assert norms_after(model, X) == {'0': '1'}
        switch_to_deploy(model)
        assert norms_after(model) == {}


@pytest.mark.parametrize('name', ['DiverseBranchBlock', 'RepVGGBlock', 'ConvNormBlock'])
def test_a_block_is_no_conv_layer(name):
    message = rf"{name} .* conv_cfg, give a conv layer .* dict\(type='mmrep.DBBConv2d'\)"
    with pytest.raises(TypeError, match=message):
        build_conv_layer(dict(type=f'mmrep.{name}'), 4, 4, 3, stride=1, bias=False)


@pytest.mark.parametrize('layer', CONV_LAYERS, ids=lambda layer: layer.__name__)
def test_a_lazy_config_finds_it(layer):
    """By its module and name, as mmengine writes it."""
    assert getattr(import_module(layer.__module__), layer.__name__) is layer


@pytest.mark.parametrize('kernel_size', [5, 7, 17])
@pytest.mark.parametrize(
    ('name', 'kind'),
    [
        ('mmrep.DilatedReparamConv2d', DilatedReparamBlock),
        ('mmrep.LargeKernelConv2d', LargeKernelBlock),
    ],
)
def test_large_kernels(name, kind, kernel_size):
    cfg = dict(type=name)
    assert type(build_conv_layer(cfg, 4, 4, 3)) is nn.Conv2d
    block = build_conv_layer(cfg, 4, 4, kernel_size, padding=kernel_size // 2, groups=4)
    assert type(block) is kind
    conv = nn.Conv2d(4, 4, kernel_size, padding=kernel_size // 2, groups=4)
    block.load_state_dict(conv.state_dict(), strict=True)
    x = image(2, 4, 9, 8, dtype=torch.float32)
    assert_same(conv(x), block.eval()(x), 1e-6)
