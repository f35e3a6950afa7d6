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
from torch import nn

from mmrep.models.backbones import ArchitectureError, UniRepLKNet
from mmrep.models.blocks import ConvNormBlock, DilatedReparamBlock, LargeKernelBlock
from mmrep.reparam import count_parameters

#: Millions of parameters in deploy form, the 1000 classes of ImageNet included (table 4).
PUBLISHED = {'A': 4.4, 'F': 6.2, 'P': 10.7, 'N': 18.3, 'T': 31, 'S': 56, 'B': 98}

TINY = dict(channels=(4, 8, 12, 16), kernel_sizes=((3,), (7, 5), (13, 3), (9,)))
SMALL = dict(arch=TINY, out_indices=(0, 1, 2, 3), gap_before_final_norm=False)


def small(**options) -> UniRepLKNet:
    """A drawn network in float64."""
    return randomise(UniRepLKNet(**{**SMALL, **options}).double())


@pytest.mark.parametrize('arch', PUBLISHED)
def test_published_sizes(arch):
    model = on_meta(UniRepLKNet, arch, deploy=True)
    width = model.arch['channels'][-1]
    millions = (count_parameters(model) + 1000 * width + 1000) / 1e6
    assert abs(millions - PUBLISHED[arch]) < (0.06 if PUBLISHED[arch] < 20 else 0.5)


@pytest.mark.parametrize(
    ('arch', 'sizes'),
    [
        ('A', [13, 13, 13, 13, 13, 13]),
        ('T', [13, 3] * 9),
        ('S', [13, 3, 3] * 9),
    ],
)
def test_kernels_of_the_stages(arch, sizes):
    model = on_meta(UniRepLKNet, arch)
    found = [
        [block.spatial.kernel_size[0] for block in getattr(model, name).blocks]
        for name in model.stages
    ]
    depths = [len(stage) for stage in found]
    assert found == [[3] * depths[0], [13] * depths[1], sizes, [13] * depths[3]]


def test_full_size_deploy_form():
    model = randomise(UniRepLKNet('A'))
    assert_deploy_equivalent(model, image(1, 3, 64, 64, dtype=torch.float32))


#: What a network may be besides the published ones.
NETWORKS = {
    'plain': {},
    'SyncBN': dict(norm_cfg=dict(type='SyncBN')),
    'adaptive padding': dict(conv_cfg=dict(type='Conv2dAdaptivePadding')),
    'large kernels': dict(block_cfg=dict(type='mmrep.LargeKernelBlock', small_kernel=3)),
    'all dilated': dict(reparam_kernels=(5, 7, 9, 13)),
    'convs and norms': dict(block_cfg=None),
}


@pytest.mark.parametrize('name', NETWORKS)
def test_deploy_form(name):
    build = functools.partial(UniRepLKNet, **SMALL | NETWORKS[name])
    deployed = assert_built_form_is_fused_one(build, image(2, 3, 70, 77))
    assert deployed.deploy
    assert not [m for m in deployed.modules() if isinstance(m, nn.BatchNorm2d)]


def test_one_conv_in_the_train_form():
    assert_one_conv_exact(UniRepLKNet(**SMALL).double(), image(2, 3, 45, 52))


def test_with_cp_changes_nothing():
    x = image(2, 3, 64, 64)
    assert_same_step(step(small(), x), step(small(with_cp=True), x))


def test_starts_near_the_identity_between_the_downsampling_layers():
    model = UniRepLKNet(**SMALL).double().eval()
    x = image(2, 4, 8, 8)
    assert_same(x, model.stage_1(x), 1e-4)


class TestArguments:
    @pytest.mark.parametrize(
        ('options', 'shapes'),
        [
            (dict(), [(4, 16, 16), (8, 8, 8), (12, 4, 4), (16, 2, 2)]),
            (dict(out_indices=-1), [(16, 2, 2)]),
            (dict(out_indices=(3, 1)), [(8, 8, 8), (16, 2, 2)]),
            (dict(gap_before_final_norm=True), [(4,), (8,), (12,), (16,)]),
            (dict(gap_before_final_norm=True, out_indices=[3]), [(16,)]),
        ],
        ids=str,
    )
    def test_outputs(self, options, shapes):
        outputs = small(**options)(image(2, 3, 64, 64))
        assert isinstance(outputs, tuple)
        assert [tuple(y.shape[1:]) for y in outputs] == shapes

    def test_outputs_are_normed(self):
        for pooled in (False, True):
            model = UniRepLKNet(**SMALL | dict(gap_before_final_norm=pooled)).double()
            for y in model.eval()(image(2, 3, 128, 128)):
                assert y.mean(1).abs().max() < 1e-6
                assert (y.var(1, correction=0) - 1).abs().max() < 1e-2

    def test_blocks(self):
        model = small()
        kinds = [[type(b.spatial) for b in getattr(model, n).blocks] for n in model.stages]
        plain, dilated = ConvNormBlock, DilatedReparamBlock
        assert kinds == [[plain], [dilated, plain], [dilated, plain], [dilated]]
        assert all(b.spatial.post_norm is not None for b in model.stage_4.blocks)
        model = small(**NETWORKS['large kernels'])
        assert isinstance(model.stage_4.blocks[0].spatial, LargeKernelBlock)

    def test_drop_path_rises(self):
        model = on_meta(UniRepLKNet, **SMALL, drop_path_rate=0.5)
        rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
        assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
        assert isinstance(model.stage_1.blocks[0].drop_path, nn.Identity)

    @pytest.mark.parametrize(
        ('options', 'message'),
        [
            (dict(arch='Z'), r"arch 'Z' is unknown; choose from A, F, .*, XL"),
            (dict(arch=TINY | dict(channels=(4, 8))), r'for each stage, not \[2, 4\]'),
            (dict(arch=dict(channels=(4, 8))), 'arch lacks kernel_sizes'),
            (
                dict(arch=dict(channels=(4, 8), kernel_sizes=(3, 7))),
                r'kernel_sizes must have a sequence for each stage, .* not \(3, 7\)',
            ),
            (dict(out_indices=(1, 1)), r'out_indices=\(1, 1\) of 4 stages'),
            (dict(out_indices=(4,)), r'out_indices=\(4,\) of 4 stages'),
        ],
        ids=str,
    )
    def test_refuses(self, options, message):
        with pytest.raises(ArchitectureError, match=message):
            UniRepLKNet(**SMALL | options)

    def test_init_cfg(self):
        model = UniRepLKNet(**SMALL)
        model.init_weights()
        conv = model.stage_4.blocks[0].pointwise_in
        assert 0.8 < conv.weight.std().item() / 0.02 < 1.2
        assert conv.weight.abs().max() < 2 and not conv.bias.any()
        scale = model.stage_4.blocks[0].pointwise_out.branch_1x1.scale
        assert (scale.weight == 1e-6).all()


class TestTraining:
    @pytest.mark.parametrize(
        ('stages', 'names'),
        [(-1, set()), (0, {'stem'}), (2, {'stem', 'stage_1', 'stage_2'})],
    )
    def test_frozen_stages(self, stages, names):
        model = UniRepLKNet(**SMALL, frozen_stages=stages)
        assert frozen(model) == names
        assert frozen(model.eval().train()) == names

    def test_norm_eval(self):
        model = small(norm_eval=True)
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert norms and not any(norm.training for norm in norms)
        assert model.training and all(p.requires_grad for p in model.parameters())
