import functools

import pytest
import torch
from laws import (
    assert_built_form_is_fused_one,
    assert_deploy_equivalent,
    assert_one_conv_exact,
    assert_same,
    assert_same_step,
    frozen,
    image,
    on_meta,
    randomise,
    step,
)
from mmpretrain.models.backbones.mobileone import MobileOne as MMPretrainMobileOne
from torch import nn

from mmrep.models.backbones import ArchitectureError, MobileOne
from mmrep.models.blocks import ConvNormBlock, MobileOneBlock, RepVGGBlock
from mmrep.reparam import count_parameters

#: Millions of parameters in deploy form, the 1000 classes of ImageNet included (table 3).
PUBLISHED = {'s0': 2.08, 's1': 4.76, 's2': 7.81, 's3': 10.08, 's4': 14.84}

#: The second stage has an identity and an SE layer, as the fourth of S4.
TINY = dict(
    num_blocks=(1, 2, 1, 1),
    width_factor=(1, 1, 1, 1),
    num_conv_branches=(1, 3, 2, 1),
    num_se_blocks=(0, 1, 0, 1),
)
SMALL = dict(arch=TINY, base_channels=4, se_cfg=dict(ratio=2), out_indices=(0, 1, 2, 3))


def small(**options) -> MobileOne:
    """A drawn network in float64."""
    return randomise(MobileOne(**{**SMALL, **options}).double())


@pytest.mark.parametrize('arch', PUBLISHED)
def test_published_sizes(arch):
    model = on_meta(MobileOne, arch, deploy=True)
    width = model.stage4[-1].out_channels
    millions = (count_parameters(model) + 1000 * width + 1000) / 1e6
    assert abs(millions - PUBLISHED[arch]) < 0.006


@pytest.mark.parametrize('deploy', [False, True], ids=['train', 'deploy'])
@pytest.mark.parametrize('arch', MMPretrainMobileOne.arch_zoo)
def test_state_dict_is_mmpretrains(arch, deploy):
    ours, theirs = (
        on_meta(t, arch, deploy=deploy) for t in (MobileOne, MMPretrainMobileOne)
    )
    shapes = {key: tensor.shape for key, tensor in ours.state_dict().items()}
    assert shapes == {key: tensor.shape for key, tensor in theirs.state_dict().items()}


#: Where mmpretrain takes lists only, and has no other base of its widths.
FOR_BOTH = dict(
    arch={
        'num_blocks': [1, 2, 2, 1],
        'width_factor': [0.125, 0.125, 0.0625, 0.0625],
        'num_conv_branches': [2, 1, 3, 1],
        'num_se_blocks': [0, 0, 2, 1],
    },
    se_cfg=dict(ratio=4, divisor=1),
)
OPTIONS = [
    dict(out_indices=(0, 1, 2, 3)),
    dict(out_indices=1),
    dict(out_indices=(-3, -1)),
    dict(in_channels=5),
    dict(act_cfg=dict(type='GELU')),
]


@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_equals_mmpretrains(options):
    theirs = randomise(MMPretrainMobileOne(**FOR_BOTH, **options).double())
    ours = MobileOne(**FOR_BOTH, **options).double()
    ours.load_state_dict(theirs.state_dict())
    x = image(2, options.get('in_channels', 3), 64, 64)
    theirs.train(False)
    ours.train(False)
    assert_same(theirs(x), ours(x))


def test_trains_as_mmpretrains():
    theirs = randomise(MMPretrainMobileOne(**FOR_BOTH).double())
    ours = MobileOne(**FOR_BOTH).double()
    ours.load_state_dict(theirs.state_dict())
    x = image(2, 3, 64, 64)
    assert_same_step(step(theirs, x), step(ours, x))


def test_full_size_deploy_form():
    model = randomise(MobileOne('s4', out_indices=(0, 1, 2, 3)))
    assert_deploy_equivalent(model, image(1, 3, 64, 64, dtype=torch.float32))


#: What a network may be besides the published ones.
NETWORKS = {
    'plain': {},
    'strides and dilations': dict(strides=(2, 1, 1, 3), dilations=(1, (1, 2), 4, 1)),
    'SyncBN': dict(norm_cfg=dict(type='SyncBN')),
    'adaptive padding': dict(conv_cfg=dict(type='Conv2dAdaptivePadding')),
    'reflect': dict(block_cfg=dict(type=MobileOneBlock, padding_mode='reflect')),
    'rep': dict(block_cfg=dict(type='mmrep.RepVGGBlock'), reparam_kernels=(3,)),
    'dbb': dict(block_cfg=dict(type='mmrep.DiverseBranchBlock')),
    'only 1x1': dict(reparam_kernels=(1,)),
    'conv and norm': dict(block_cfg=None),
}


@pytest.mark.parametrize('name', NETWORKS)
def test_deploy_form(name):
    build = functools.partial(MobileOne, **SMALL | NETWORKS[name])
    deployed = assert_built_form_is_fused_one(build, image(2, 3, 45, 52))
    assert deployed.deploy


def test_one_conv_in_the_train_form():
    assert_one_conv_exact(MobileOne(**SMALL).double(), image(2, 3, 45, 52))


def test_with_cp_changes_nothing():
    x = image(2, 3, 32, 32)
    assert_same_step(step(small(), x), step(small(with_cp=True), x))


class TestArguments:
    @pytest.mark.parametrize(
        ('options', 'shapes'),
        [
            (dict(), [(4, 16, 16), (8, 8, 8), (16, 4, 4), (32, 2, 2)]),
            (dict(out_indices=2), [(16, 4, 4)]),
            (dict(out_indices=-1), [(32, 2, 2)]),
            (dict(out_indices=[-4, 1]), [(4, 16, 16), (8, 8, 8)]),
            (dict(base_channels=2), [(2, 16, 16), (4, 8, 8), (8, 4, 4), (16, 2, 2)]),
            (
                dict(strides=(2, 2, 1, 1), dilations=(1, 1, 2, 4)),
                [(4, 16, 16), (8, 8, 8), (16, 8, 8), (32, 8, 8)],
            ),
        ],
        ids=str,
    )
    def test_outputs(self, options, shapes):
        outputs = small(**options)(image(2, 3, 64, 64))
        assert isinstance(outputs, tuple)
        assert [tuple(y.shape[1:]) for y in outputs] == shapes

    def test_dilation_of_the_depthwise_blocks(self):
        model = small(dilations=(1, (2, 4), 1, 1))
        geometries = [(b.geometry.dilation, b.geometry.padding) for b in model.stage2]
        one = (1, 1), (0, 0)
        assert geometries == [((2, 2), (2, 2)), one, ((4, 4), (4, 4)), one]

    def test_stem_has_at_most_the_channels_of_the_base(self):
        assert on_meta(MobileOne, 's0').stage0.out_channels == 48
        assert on_meta(MobileOne, 's1').stage0.out_channels == 64

    def test_num_convs_of_each_stage_and_one_in_the_stem(self):
        model = small()
        counts = [{b.num_convs for b in getattr(model, name)} for name in model.stages]
        assert counts == [{1}, {3}, {2}, {1}] and model.stage0.num_convs == 1

    def test_num_convs_of_the_block_cfg_are_for_all(self):
        model = small(block_cfg=dict(type='mmrep.MobileOneBlock', num_convs=2))
        blocks = [m for m in model.modules() if isinstance(m, MobileOneBlock)]
        assert {block.num_convs for block in blocks} == {2}

    def test_num_convs_reach_blocks_that_pass_them_on(self):
        class Own(MobileOneBlock):
            def __init__(self, *args, **kwargs) -> None:
                super().__init__(*args, **kwargs)

        assert small(block_cfg=dict(type=Own)).stage2[0].num_convs == 3

    @pytest.mark.parametrize('cfg', [dict(type='mmrep.Nope'), {}], ids=str)
    def test_no_block(self, cfg):
        with pytest.raises(KeyError, match=r'Nope is not in|must contain the key "type"'):
            small(block_cfg=cfg)

    def test_blocks_of_another_type(self):
        model = small(**NETWORKS['rep'])
        kinds = [type(block) for block in model.stage2]
        assert kinds == [RepVGGBlock, ConvNormBlock] * 2

    def test_se_in_the_last_blocks(self):
        model = small()
        found = [[b.se is not None for b in getattr(model, name)] for name in model.stages]
        none, both = [False, False], [True, True]
        assert found == [none, none + both, none, both]
        assert model.stage2[2].se.conv1.conv.out_channels == 8

    @pytest.mark.parametrize(
        ('options', 'message'),
        [
            (dict(arch='s5'), r"arch 's5' is unknown; choose from s0, s1, s2, s3, s4"),
            (dict(arch={}), 'arch lacks num_blocks, num_conv_branches, num_se_blocks, w'),
            (dict(arch=TINY | dict(name='x')), 'arch has unknown keys: name; known are'),
            (dict(out_indices=(1, 1)), r'out_indices=\(1, 1\) of 4 stages'),
            (dict(strides=(2, 2)), r'one entry for each stage, not \[4, 4, 4, 4, 2, 4\]'),
            (dict(dilations=(1,)), r'one entry for each stage, not \[4, 4, 4, 4, 4, 1\]'),
            (dict(out_indices=(4,)), r'out_indices=\(4,\) of 4 stages'),
            (dict(out_indices=-5), r'out_indices=\(-1,\) of 4 stages'),
            (
                dict(arch=TINY | dict(num_se_blocks=(0, 0, 2, 0))),
                'asks for 2 SE blocks in a stage of 1 ',
            ),
            (
                dict(dilations=(1, (2, 2, 2), 1, 1)),
                r'dilations \(2, 2, 2\) of a stage of 2',
            ),
        ],
        ids=str,
    )
    def test_refuses(self, options, message):
        with pytest.raises(ArchitectureError, match=message):
            MobileOne(**SMALL | options)

    def test_init_cfg(self):
        model = MobileOne(**SMALL)
        model.init_weights()
        branch = model.stage4[1].branch_conv_list[0]
        assert (branch.norm.weight == 1).all()
        # Kaiming, fan out: variance 2 / 32.
        assert 0.8 < branch.conv.weight.std().item() / (2 / 32) ** 0.5 < 1.2


class TestTraining:
    @pytest.mark.parametrize(
        ('stages', 'names'),
        [(-1, set()), (0, {'stage0'}), (2, {'stage0', 'stage1', 'stage2'})],
    )
    def test_frozen_stages(self, stages, names):
        model = MobileOne(**SMALL, frozen_stages=stages)
        assert frozen(model) == names
        assert frozen(model.eval().train()) == names

    def test_norm_eval(self):
        model = small(norm_eval=True)
        assert model.train() is model
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert norms and not any(norm.training for norm in norms)
        assert model.training and all(p.requires_grad for p in model.parameters())
