import copy

import pytest
import torch
from laws import (
    always_one_conv,
    assert_deploy_equivalent,
    assert_differ,
    assert_same,
    assert_same_step,
    count_convs,
    image,
    kept_maps,
    randomise,
    step,
)
from mmcv.ops import DeformConv2d
from mmseg.models.backbones import ResNet as MMSegResNet
from mmseg.models.backbones import ResNetV1c as MMSegResNetV1c
from mmseg.models.backbones import ResNetV1d as MMSegResNetV1d
from torch import nn

from mmrep.models.backbones import (
    ArchitectureError,
    DBBResNet,
    DBBResNetV1c,
    DBBResNetV1d,
    ReparamResNet,
)
from mmrep.models.blocks import DiverseBranchBlock, RepVGGBlock
from mmrep.reparam import NotFoldableError, branch_by_branch, count_parameters

SMALL = dict(base_channels=4, stem_channels=8)
DILATED = dict(strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4))
DBB = dict(type='mmrep.DiverseBranchBlock')


def plugin(kind: str, position: str = 'after_conv3', stages=None, **cfg) -> dict:
    """A plugin's config."""
    stages = {} if stages is None else {'stages': stages}
    return dict(cfg=dict(type=kind, **cfg), position=position, **stages)


CONTEXT = dict(ratio=0.5)
ATTENTION = dict(num_heads=2, attention_type='1111', kv_stride=2)
#: Networks that mmseg builds, too.
MMSEG = {
    '18': dict(depth=18),
    '34': dict(depth=34, num_stages=2, strides=(1, 2), dilations=(1, 1), out_indices=(1,)),
    '50': dict(depth=50),
    'caffe': dict(depth=50, style='caffe'),
    'deep stem': dict(depth=18, deep_stem=True),
    'avg_down': dict(depth=50, avg_down=True),
    'dilations': dict(depth=50, **DILATED),
    'contract_dilation': dict(depth=50, **DILATED, contract_dilation=True),
    'contract_dilation 18': dict(depth=18, **DILATED, contract_dilation=True),
    'multi_grid': dict(depth=50, **DILATED, multi_grid=(1, 2, 4)),
    'multi_grid 18': dict(depth=18, **DILATED, multi_grid=(2, 4)),
    'in_channels': dict(depth=18, in_channels=5),
    'norm': dict(depth=18, norm_cfg=dict(type='GN', num_groups=2)),
    'conv': dict(depth=18, conv_cfg=dict(type='ConvWS')),
    'dcn': dict(depth=50, dcn=dict(type='DCN'), stage_with_dcn=(False, True, True, False)),
    'dcn v2': dict(
        depth=50, dcn=dict(type='DCNv2'), stage_with_dcn=(False, False, True, True)
    ),
    'dcn, no fallback': dict(
        depth=50,
        dcn=dict(type='DCN', fallback_on_stride=False),
        stage_with_dcn=(False, False, True, False),
    ),
    'plugins': dict(
        depth=50,
        plugins=[
            plugin('ContextBlock', 'after_conv1', (False, True, True, False), **CONTEXT),
            plugin('ContextBlock', 'after_conv3', postfix='_a', **CONTEXT),
            plugin(
                'GeneralizedAttention',
                'after_conv2',
                (False, False, True, True),
                **ATTENTION,
            ),
            plugin('NonLocal2d', 'after_conv1', (True, False, False, False), reduction=2),
        ],
    ),
}


def pair(name: str) -> tuple[ReparamResNet, MMSegResNet]:
    """The same network of both packages, drawn, in float64."""
    options = SMALL | MMSEG[name]
    # mmseg takes entries out of the dcn config of its caller.
    theirs = randomise(MMSegResNet(**copy.deepcopy(options)).double())
    ours = ReparamResNet(**options).double()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize('name', MMSEG)
def test_equals_mmsegs(name):
    ours, theirs = pair(name)
    x = image(2, MMSEG[name].get('in_channels', 3), 64, 64)
    theirs.eval()
    ours.eval()
    with torch.no_grad():
        assert_same(theirs(x), ours(x))
    assert ours.state_dict().keys() == theirs.state_dict().keys()


@pytest.mark.parametrize('name', ['18', '50', 'deep stem', 'avg_down'])
def test_trains_as_mmsegs(name):
    ours, theirs = pair(name)
    x = image(2, 3, 64, 64)
    assert_same_step(step(theirs, x), step(ours, x))


@pytest.mark.parametrize('depth', [18, 34, 50, 101, 152])
def test_state_dict_is_mmsegs(depth):
    with torch.device('meta'):
        ours, theirs = (t(depth).state_dict() for t in (ReparamResNet, MMSegResNet))
    shapes = {key: tensor.shape for key, tensor in ours.items()}
    assert shapes == {key: tensor.shape for key, tensor in theirs.items()}


@pytest.mark.parametrize(
    ('ours', 'theirs'), [(DBBResNetV1c, MMSegResNetV1c), (DBBResNetV1d, MMSegResNetV1d)]
)
def test_variants(ours, theirs):
    plain = ours(depth=50, block_cfg=None, **SMALL).double()
    reference = randomise(theirs(depth=50, **SMALL).double())
    plain.load_state_dict(reference.state_dict())
    reference.eval()
    x = image(1, 3, 64, 64)
    assert_same(reference(x), plain.eval()(x))


def test_plugins_are_chained():
    """mmseg applies the last one of a position to what the first one got."""
    chained = [
        plugin('ContextBlock', 'after_conv2', postfix=postfix, **CONTEXT)
        for postfix in '12'
    ]
    model = randomise(ReparamResNet(50, plugins=chained, **SMALL).double()).eval()
    block, x = model.layer1[1], image(2, 16, 8, 8)
    first, second = block.context_block1, block.context_block2
    y = block.bn1(block.conv1(x)).relu()
    y = second(first(block.bn2(block.conv2(y)).relu()))
    y = (block.bn3(block.conv3(y)) + x).relu()
    assert_same(y, block(x))


@pytest.mark.parametrize('fallback', [False, True])
def test_deformable_convs_fall_back_on_a_stride(fallback):
    """mmseg forgets the option after the first block of the network."""
    dcn = dict(type='DCN', fallback_on_stride=fallback)
    model = ReparamResNet(50, dcn=dcn, stage_with_dcn=(False, True, True, False), **SMALL)
    convs = [m for m in model.modules() if isinstance(m, DeformConv2d)]
    assert len(convs) == (8 if fallback else 10)
    assert [conv.stride for conv in convs].count((2, 2)) == (0 if fallback else 2)


#: Networks of Diverse Branch Blocks.
NETWORKS = {
    '18': (DBBResNet, dict(depth=18)),
    '50': (DBBResNet, dict(depth=50)),
    'V1c': (DBBResNetV1c, dict(depth=50)),
    'V1d': (DBBResNetV1d, dict(depth=18)),
    'dilations': (DBBResNet, dict(depth=18, **DILATED)),
    'multi_grid': (DBBResNet, dict(depth=50, **DILATED, multi_grid=(1, 2, 4))),
    'caffe': (DBBResNet, dict(depth=50, style='caffe')),
    'SyncBN': (DBBResNet, dict(depth=18, norm_cfg=dict(type='SyncBN', requires_grad=True))),
    'leaky': (DBBResNet, dict(depth=18, act_cfg=dict(type='LeakyReLU'))),
    'adaptive padding': (
        DBBResNet,
        dict(depth=18, conv_cfg=dict(type='Conv2dAdaptivePadding')),
    ),
    'plugins': (
        DBBResNet,
        dict(depth=50, plugins=[plugin('ContextBlock', 'after_conv2', **CONTEXT)]),
    ),
    'dcn': (
        DBBResNet,
        dict(depth=50, dcn=dict(type='DCN'), stage_with_dcn=(False, False, True, False)),
    ),
    'stem as well': (DBBResNet, dict(depth=18, reparam_kernels=(3, 7))),
    'RepVGG blocks': (
        ReparamResNet,
        dict(depth=18, block_cfg=dict(type='mmrep.RepVGGBlock')),
    ),
    'one stage': (
        DBBResNet,
        dict(depth=18, num_stages=1, strides=(1,), dilations=(1,), out_indices=(0,)),
    ),
}


@pytest.mark.parametrize('name', NETWORKS)
def test_deploy_form(name):
    network, options = NETWORKS[name]
    x = image(1, 3, 64, 64)
    deployed = assert_deploy_equivalent(network(**SMALL, **options).double(), x)
    norms = [
        m for m in deployed.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
    ]
    # The plain units are fused as well; a deformable conv keeps its norm.
    assert len(norms) == (6 if name == 'dcn' else 0)
    built = network(**SMALL, **options, deploy=True).double().eval()
    built.load_state_dict(deployed.state_dict())
    x = image(2, 3, 64, 64, seed=5)
    assert_same(deployed(x), built(x))


@pytest.mark.parametrize('name', ['18', '50'])
def test_plain_network_has_a_deploy_form(name):
    """Its convs absorb their norms."""
    model = randomise(ReparamResNet(**SMALL, **MMSEG[name]).double()).eval()
    x = image(1, 3, 64, 64)
    expected = model(x)
    model.switch_to_deploy()
    assert_same(expected, model(x))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    built = ReparamResNet(**SMALL, **MMSEG[name], deploy=True).double()
    built.load_state_dict(model.state_dict())
    assert_same(expected, built.eval()(x))


@pytest.mark.parametrize('depth', [18, 34, 50, 101, 152])
def test_every_kxk_conv_is_a_block(depth):
    """And the 1x1 convs, the shortcut and the 7x7 stem are not."""
    with torch.device('meta'):
        model = DBBResNet(depth)
    blocks = [m for m in model.modules() if isinstance(m, DiverseBranchBlock)]
    layers = sum(model.stage_blocks)
    assert len(blocks) == (2 * layers if depth < 50 else layers)
    assert {block.kernel_size for block in blocks} == {(3, 3)}
    assert {block.act for block in blocks} == {None}
    inside = {m for block in blocks for m in block.modules()}
    outside = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m not in inside]
    assert {m.kernel_size for m in outside} == {(1, 1), (7, 7)}


@pytest.mark.parametrize(
    ('depth', 'width', 'keys', 'millions'),
    [(18, 512, (586, 42), (26.29, 11.68)), (50, 2048, (784, 108), None)],
)
def test_published_sizes(depth, width, keys, millions):
    """With the head of 1000 classes, as in the official checkpoints and the paper."""
    for form in range(2):
        with torch.device('meta'):
            model = DBBResNet(depth, deploy=form == 1)
        assert len(model.state_dict()) + 2 == keys[form]
        if millions:
            count = count_parameters(model) + 1000 * width + 1000
            assert round(count / 1e6, 2) == millions[form]


def test_stride_of_the_block():
    """On the 3x3 in a bottleneck, and on what pools inside a block."""
    with torch.device('meta'):
        block = DBBResNet(50).layer2[0].conv2
    assert block.stride == (2, 2)
    assert block.branch_1x1_kxk.conv2.stride == (2, 2)
    assert block.branch_avg.pool.geometry.stride == (2, 2)
    assert block.branch_avg.conv1.stride == (1, 1)


class TestInitWeights:
    @pytest.mark.parametrize(
        'options',
        [
            dict(depth=18),
            dict(depth=50),
            dict(depth=18, block_cfg=DBB),
            dict(depth=50, block_cfg=DBB),
            dict(depth=18, block_cfg=dict(type='mmrep.RepVGGBlock')),
            dict(depth=18, block_cfg=dict(type='mmrep.ConvNormBlock')),
            dict(depth=18, block_cfg=DBB, norm_cfg=dict(type='GN', num_groups=2)),
            dict(depth=50, norm_cfg=dict(type='GN', num_groups=2)),
        ],
        ids=str,
    )
    def test_zero_init_residual(self, options):
        """Every residual block starts as its shortcut, and can grow."""
        model = ReparamResNet(**SMALL, **options)
        model.init_weights()
        for stage in model.res_layers:
            for block in getattr(model, stage):
                x = image(2, block.inplanes, 8, 8, dtype=torch.float32)
                shortcut = x if block.downsample is None else block.downsample(x)
                assert torch.equal(block(x), shortcut.relu())
        block = model.layer1[1].train()
        x = image(2, block.inplanes, 8, 8, dtype=torch.float32)
        grown = [n for n, g in step(block, x)['gradients'].items() if g.norm() > 0]
        assert len(grown) > 1

    @pytest.mark.parametrize('block_cfg', [None, DBB])
    def test_can_be_forbidden(self, block_cfg):
        model = ReparamResNet(18, **SMALL, block_cfg=block_cfg, zero_init_residual=False)
        model.init_weights()
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert all((norm.weight == 1).all() for norm in norms)

    @pytest.mark.parametrize('block_cfg', [None, DBB])
    def test_norms_without_scale(self, block_cfg):
        cfg = dict(type='BN', affine=False)
        model = ReparamResNet(18, **SMALL, block_cfg=block_cfg, norm_cfg=cfg)
        model.init_weights()
        assert model.norm1.weight is None

    def test_own_init_cfg(self):
        cfg = dict(type='Constant', layer='BatchNorm2d', val=3)
        model = DBBResNet(18, **SMALL, init_cfg=cfg)
        model.init_weights()
        assert (model.layer1[0].conv2.branch_kxk.norm.weight == 3).all()

    def test_deploy_form(self):
        DBBResNet(18, **SMALL, deploy=True).init_weights()

    def test_pretrained(self, tmp_path):
        model = randomise(DBBResNet(18, **SMALL))
        file = str(tmp_path / 'weights.pth')
        torch.save(model.state_dict(), file)
        with pytest.warns(
            DeprecationWarning, match='pretrained is deprecated: use init_cfg'
        ):
            other = DBBResNet(18, **SMALL, pretrained=file)
        other.init_weights()
        assert_same(model.state_dict(), other.state_dict())


class TestTraining:
    @pytest.mark.parametrize('network', [ReparamResNet, DBBResNet, DBBResNetV1c])
    @pytest.mark.parametrize('stages', [-1, 0, 1, 4])
    @pytest.mark.parametrize('deploy', [False, True])
    def test_frozen_stages(self, network, stages, deploy):
        """What mmseg freezes, from the construction on and after every train()."""
        model = network(depth=18, **SMALL, frozen_stages=stages, deploy=deploy)
        layers = {f'layer{i}' for i in range(1, stages + 1)}
        stem = {'conv1', 'bn1', 'stem'} if stages >= 0 else set()
        for _ in range(2):
            for name, module in model.named_modules():
                child = name.split('.')[0]
                if child and child not in ('relu', 'maxpool'):
                    assert module.training is not (child in layers | stem), name
            for name, parameter in model.named_parameters():
                assert parameter.requires_grad is not (name.split('.')[0] in layers | stem)
            model.eval().train()

    def test_frozen_stages_do_not_move(self):
        model = randomise(DBBResNet(18, **SMALL, frozen_stages=2)).train()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        step(model, image(2, 3, 64, 64, dtype=torch.float32))
        for key, tensor in model.state_dict().items():
            frozen = key.split('.')[0] in ('conv1', 'bn1', 'layer1', 'layer2')
            if 'running' in key:
                assert torch.equal(before[key], tensor) is frozen, key

    @pytest.mark.parametrize('network', [ReparamResNet, DBBResNet])
    def test_norm_eval(self, network):
        model = network(18, **SMALL, norm_eval=True).eval().train()
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert not any(norm.training for norm in norms)
        assert model.layer1.training

    def test_norm_eval_computes_with_one_conv(self):
        model = randomise(DBBResNet(18, **SMALL, norm_eval=True).double()).train()
        x = image(2, 3, 64, 64)
        with branch_by_branch(model):
            reference, branches = step(model, x), count_convs(model, x)
        with always_one_conv(model):
            assert_same_step(reference, step(model, x))
            assert count_convs(model, x) < branches

    def test_mode_returns_the_model(self):
        model = DBBResNet(18, **SMALL)
        assert model.train() is model.eval() is model

    @pytest.mark.parametrize('depth', [18, 50])
    def test_with_cp_changes_nothing(self, depth):
        options = dict(depth=depth, num_stages=2, strides=(1, 2), dilations=(1, 1))
        options |= SMALL | dict(out_indices=(1,))
        plain, saving = (
            randomise(DBBResNet(**options, with_cp=cp)) for cp in (False, True)
        )
        x = image(2, 3, 32, 32)
        assert_same_step(step(plain.double(), x), step(saving.double(), x))

    @pytest.mark.parametrize('depth', [18, 50])
    def test_with_cp_keeps_the_input_of_a_block(self, depth):
        options = dict(depth=depth, num_stages=1, strides=(1,), dilations=(1,))
        options |= SMALL | dict(out_indices=(0,))
        plain, saving = (DBBResNet(**options, with_cp=cp).layer1[1] for cp in (False, True))
        x = image(4, plain.inplanes, 64, 64, dtype=torch.float32).requires_grad_()
        assert kept_maps(saving, x) <= 0.1
        assert kept_maps(plain, x) >= 1


class TestArguments:
    @pytest.mark.parametrize(
        ('options', 'message'),
        [
            (dict(num_stages=5), 'num_stages must be 1 to 4, not 5'),
            (dict(num_stages=0), 'num_stages must be 1 to 4, not 0'),
            (dict(strides=(1, 2)), r'strides \(1, 2\) .* entry for each of the 4 stages'),
            (dict(dilations=(1, 2)), r'dilations \(1, 2\) must have an entry'),
            (dict(out_indices=(4,)), r'out_indices=\(4,\) of 4 stages'),
            (
                dict(dcn=dict(type='DCN'), stage_with_dcn=(True,)),
                r'stage_with_dcn=\(True,\) of',
            ),
            (
                dict(depth=18, dcn=dict(type='DCN'), stage_with_dcn=(True,) * 4),
                'dcn needs bottlenecks',
            ),
            (
                dict(depth=18, plugins=[plugin('ContextBlock')]),
                'plugins need bottlenecks',
            ),
            (
                dict(plugins=[plugin('ContextBlock', 'first')]),
                "position 'first' must be one of",
            ),
            (
                dict(plugins=[plugin('ContextBlock', stages=(True,))]),
                r'stages \(True,\) of 4',
            ),
            (
                dict(plugins=[plugin('ContextBlock', **CONTEXT)] * 2),
                'is taken: give the plugin a post',
            ),
            (dict(multi_grid=(1, 2)), r'multi_grid=\(1, 2\) of a stage of 3 blocks'),
            (dict(style='tensorflow'), "style must be 'pytorch' or 'caffe', not 'tens"),
            (
                dict(pretrained='a.pth', init_cfg=dict(type='Pretrained')),
                'either init_cfg or',
            ),
            (
                dict(
                    conv_cfg=dict(type='ConvWS'),
                    dcn=dict(type='DCN'),
                    stage_with_dcn=(True,) * 4,
                ),
                'conv_cfg must be None where dcn is given',
            ),
        ],
        ids=lambda value: str(value)[:40],
    )
    @pytest.mark.parametrize('error', [ArchitectureError, ValueError, AssertionError])
    def test_refuses(self, options, message, error):
        """As mmseg does, an AssertionError; and a ValueError as well."""
        with pytest.raises(error, match=message):
            ReparamResNet(**{'depth': 50, **SMALL, **options})

    def test_unknown_depth(self):
        """As mmseg, a KeyError."""
        with pytest.raises(KeyError, match=r'depth 20 is unknown; choose from \(18, 34'):
            DBBResNet(20)

    def test_pretrained_of_another_type(self):
        with pytest.raises(TypeError, match='pretrained must be a str or None, not 1'):
            DBBResNet(18, pretrained=1)

    def test_configs_are_not_changed(self):
        options = copy.deepcopy(MMSEG['dcn, no fallback'] | MMSEG['plugins'])
        before = copy.deepcopy(options)
        ReparamResNet(**SMALL, **options)
        assert options == before

    def test_block_options_reach_every_block(self):
        cfg = dict(
            type='mmrep.DiverseBranchBlock', branches=('kxk', '1x1'), single_init=True
        )
        model = DBBResNet(18, **SMALL, block_cfg=cfg)
        blocks = [m for m in model.modules() if isinstance(m, DiverseBranchBlock)]
        assert {tuple(block.branches()) for block in blocks} == {
            ('branch_kxk', 'branch_1x1')
        }

    def test_any_registered_block(self):
        model = ReparamResNet(18, **SMALL, block_cfg=dict(type='mmrep.RepVGGBlock'))
        assert sum(isinstance(m, RepVGGBlock) for m in model.modules()) == 16

    def test_blocks_that_cannot_be_fused(self):
        model = DBBResNet(18, **SMALL, norm_cfg=dict(type='GN', num_groups=2))
        keys = list(model.state_dict())
        with pytest.raises(
            NotFoldableError, match=r'^layer1.0.conv1.branch_kxk: GroupNorm'
        ):
            model.switch_to_deploy()
        assert list(model.state_dict()) == keys
        assert_differ(*(model.layer1[0](image(2, 8, 4, 4, seed=s).float()) for s in (1, 2)))
