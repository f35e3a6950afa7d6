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
from mmcv.cnn.bricks import DropPath
from mmpretrain.models.backbones.replknet import RepLKNet as MMPretrainRepLKNet
from torch import nn

from mmrep.models.backbones import ArchitectureError, RepLKNet
from mmrep.models.blocks import ConvNormBlock, DilatedReparamBlock, LargeKernelBlock
from mmrep.reparam import count_parameters

#: Millions of parameters, the 1000 classes of ImageNet included (table 5).
PUBLISHED = {'31B': 79, '31L': 172, 'XL': 335}

#: mmpretrain takes these for both.
TINY = dict(
    large_kernel_sizes=[9, 7, 5, 3],
    layers=[1, 2, 1, 1],
    channels=[4, 8, 8, 12],
    small_kernel=3,
    dw_ratio=1.5,
)
SMALL = dict(arch=TINY, out_indices=(0, 1, 2, 3), drop_path_rate=0)


def small(**options) -> RepLKNet:
    """A drawn network in float64."""
    return randomise(RepLKNet(**{**SMALL, **options}).double())


@pytest.mark.parametrize('arch', PUBLISHED)
def test_published_sizes(arch):
    for deploy in (False, True):
        model = on_meta(RepLKNet, arch, deploy=deploy)
        width = model.arch['channels'][-1]
        millions = (count_parameters(model) + 1000 * width + 1000) / 1e6
        assert abs(millions - PUBLISHED[arch]) < 1


@pytest.mark.parametrize('deploy', [False, True], ids=['train', 'deploy'])
@pytest.mark.parametrize('arch', MMPretrainRepLKNet.arch_settings)
def test_state_dict_is_mmpretrains(arch, deploy):
    # Built for real, which the meta device is not enough for, and so of fewer channels.
    theirs = dict(MMPretrainRepLKNet.arch_settings[arch])
    own = dict(RepLKNet.arch_settings[arch])
    for settings in (theirs, own):
        settings['channels'] = [width // 32 for width in settings['channels']]
    theirs = MMPretrainRepLKNet(theirs, small_kernel_merged=deploy, out_indices=(1, 3))
    ours = RepLKNet(own, deploy=deploy, out_indices=(1, 3))
    shapes = {key: tensor.shape for key, tensor in ours.state_dict().items()}
    assert shapes == {key: tensor.shape for key, tensor in theirs.state_dict().items()}


OPTIONS = [
    dict(out_indices=(0, 1, 2, 3)),
    dict(out_indices=(1,)),
    dict(in_channels=5),
    dict(ffn_ratio=2),
    dict(arch=TINY | dict(small_kernel=None)),
]


@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_equals_mmpretrains(options):
    options = dict(arch=TINY, drop_path_rate=0) | options
    theirs = randomise(MMPretrainRepLKNet(**options).double())
    ours = RepLKNet(**options).double()
    ours.load_state_dict(theirs.state_dict())
    x = image(2, options.get('in_channels', 3), 64, 64)
    # Its train() returns nothing.
    theirs.eval()
    ours.eval()
    assert_same(theirs(x), ours(x))
    ours.switch_to_deploy()
    theirs.switch_to_deploy()
    assert_same(theirs(x), ours(x))
    theirs.load_state_dict(ours.state_dict())
    assert_same(theirs(x), ours(x))


def test_trains_as_mmpretrains():
    theirs = randomise(MMPretrainRepLKNet(**SMALL).double())
    ours = RepLKNet(**SMALL).double()
    ours.load_state_dict(theirs.state_dict())
    x = image(2, 3, 64, 64)
    assert_same_step(step(theirs, x), step(ours, x))


@pytest.mark.long
def test_full_size_deploy_form():
    model = randomise(RepLKNet('31B'))
    assert_deploy_equivalent(model, image(1, 3, 64, 64, dtype=torch.float32))


#: What a network may be besides the published ones.
NETWORKS = {
    'plain': {},
    'strides and dilations': dict(strides=(2, 2, 1, 1), dilations=(1, 1, 2, 4)),
    'SyncBN': dict(norm_cfg=dict(type='SyncBN')),
    'adaptive padding': dict(conv_cfg=dict(type='Conv2dAdaptivePadding')),
    'dilated': dict(block_cfg=dict(type=DilatedReparamBlock, kernels=((3, 1),))),
    'conv and norm': dict(block_cfg=None),
}


@pytest.mark.parametrize('name', NETWORKS)
def test_deploy_form(name):
    build = functools.partial(RepLKNet, **SMALL | NETWORKS[name])
    deployed = assert_built_form_is_fused_one(build, image(2, 3, 70, 77))
    assert deployed.deploy


def test_one_conv_in_the_train_form():
    assert_one_conv_exact(RepLKNet(**SMALL).double(), image(2, 3, 45, 52))


def test_with_cp_changes_nothing():
    x = image(2, 3, 64, 64)
    assert_same_step(step(small(), x), step(small(with_cp=True), x))


class TestArguments:
    @pytest.mark.parametrize(
        ('options', 'shapes'),
        [
            (dict(), [(4, 16, 16), (8, 8, 8), (8, 4, 4), (12, 2, 2)]),
            (dict(out_indices=-1), [(12, 2, 2)]),
            (dict(out_indices=(3, 1)), [(8, 8, 8), (12, 2, 2)]),
            (dict(out_indices=3, strides=(1, 2, 1, 1)), [(12, 16, 16)]),
        ],
        ids=str,
    )
    def test_outputs(self, options, shapes):
        outputs = small(**options)(image(2, 3, 64, 64))
        assert isinstance(outputs, tuple)
        assert [tuple(y.shape[1:]) for y in outputs] == shapes

    def test_blocks(self):
        def kind(**options) -> type:
            return type(small(**options).stages[1].blocks[2].large_kernel)

        assert kind() is LargeKernelBlock
        assert kind(**NETWORKS['dilated']) is DilatedReparamBlock
        assert kind(**NETWORKS['conv and norm']) is ConvNormBlock
        own = small(block_cfg=dict(type='mmrep.LargeKernelBlock', small_kernel=1))
        assert own.stages[0].blocks[0].large_kernel.small_kernel == 1

    def test_dilations_are_those_of_the_large_kernels(self):
        model = small(**NETWORKS['strides and dilations'])
        blocks = [b.large_kernel for s in model.stages for b in list(s.blocks)[::2]]
        assert [block.dilation[0] for block in blocks] == [1, 1, 1, 2, 4]
        assert all(block.lkb_origin.conv.dilation == block.dilation for block in blocks)

    def test_configs_reach_every_layer(self):
        model = RepLKNet(
            **SMALL,
            norm_cfg=dict(type='BN', eps=1e-3),
            act_cfg=dict(type='SiLU'),
            ffn_act_cfg=dict(type='Tanh'),
        )
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert norms and all(norm.eps == 1e-3 for norm in norms)
        kinds = [type(m) for m in model.modules()]
        assert kinds.count(nn.Tanh) == sum(TINY['layers'])
        assert kinds.count(nn.SiLU) == 4 + 6 + 2 * sum(TINY['layers'])
        assert nn.ReLU not in kinds and nn.GELU not in kinds

    def test_drop_path_rises(self):
        model = on_meta(RepLKNet, **SMALL | dict(drop_path_rate=0.4))
        rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
        expected = [rate for rate in (0.1, 0.2, 0.3, 0.4) for _ in range(2)]
        assert rates == pytest.approx(expected)

    @pytest.mark.parametrize(
        ('options', 'message'),
        [
            (dict(arch='Z'), r"arch 'Z' is unknown; choose from 31B, 31L, XL"),
            (dict(arch=TINY | dict(channels=(4, 8))), 'must have one entry for each stage'),
            (dict(strides=(2, 2)), 'must have one entry for each stage'),
            (dict(arch=dict(channels=(4, 8))), 'arch lacks .*layers'),
            (
                dict(arch=TINY | dict(large_kernel_sizes=[9, 8, 5, 3])),
                r'large_kernel_sizes=\[9, 8, 5, 3\] must be odd',
            ),
            (dict(arch=TINY | dict(small_kernel=4)), 'small_kernel=4 must be odd and at'),
            (dict(arch=TINY | dict(small_kernel=5)), 'small_kernel=5 must be odd and at'),
            (dict(out_indices=(1, 1)), r'out_indices=\(1, 1\) of 4 stages'),
            (dict(out_indices=(4,)), r'out_indices=\(4,\) of 4 stages'),
        ],
        ids=str,
    )
    def test_refuses(self, options, message):
        with pytest.raises(ArchitectureError, match=message):
            RepLKNet(**SMALL | options)


class TestTraining:
    @pytest.mark.parametrize('stages', [-1, 0, 1, 2, 4, 9])
    def test_frozen_stages(self, stages):
        """Also what leads to a frozen stage."""
        names = {'stem'} if stages >= 0 else set()
        names |= {f'stages.{i}' for i in range(min(stages, 4))}
        names |= {f'transitions.{i}' for i in range(min(stages, 4) - 1)}
        model = RepLKNet(**SMALL, frozen_stages=stages)
        for _ in range(2):
            parts = dict(stem=model.stem)
            parts |= {f'stages.{i}': stage for i, stage in enumerate(model.stages)}
            parts |= {f'transitions.{i}': t for i, t in enumerate(model.transitions)}
            for name, part in parts.items():
                is_frozen = name in names
                assert frozen(nn.ModuleDict(dict(part=part))) == (
                    {'part'} if is_frozen else set()
                )
                assert part.training is not is_frozen
            model.eval().train()

    def test_norm_eval(self):
        model = small(norm_eval=True)
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert norms and not any(norm.training for norm in norms)
        assert model.training and all(p.requires_grad for p in model.parameters())
