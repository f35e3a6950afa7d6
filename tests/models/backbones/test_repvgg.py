import functools

import pytest
import timm
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
from mmpretrain.models.backbones.repvgg import RepVGG as MMPretrainRepVGG
from torch import nn

from mmrep.models.backbones import ArchitectureError, RepVGG
from mmrep.models.blocks import DiverseBranchBlock, RepVGGBlock
from mmrep.reparam import count_parameters

#: Parameters of the published networks in deploy and train form (None where no number is
#: published), the 1000 classes of ImageNet included: millions, some of them rounded and
#: some cut after two digits.
PUBLISHED = {
    'A0': (8.30, 9.11),
    'A1': (12.78, 14.09),
    'A2': (25.49, 28.21),
    'B0': (14.33, 15.82),
    'B1': (51.82, 57.42),
    'B1g2': (41.36, 45.78),
    'B1g4': (36.12, 39.97),
    'B2': (80.31, 89.02),
    'B2g2': (63.96, None),
    'B2g4': (55.77, 61.76),
    'B3': (110.96, 123.09),
    'B3g2': (87.40, None),
    'B3g4': (75.62, 83.83),
    'D2se': (120.39, 133.33),
}
#: Keys of the published checkpoints in train and deploy form, by the arch's first letter.
KEYS = {'A': (351, 46), 'B': (453, 58), 'D': (985, 290)}

TINY = dict(num_blocks=(1, 2), width_factor=(1, 1.5))
SMALL = dict(arch=TINY, base_channels=4, out_indices=(0, 1))


def small(**options) -> RepVGG:
    """A drawn network of 8 blocks' worth in float64."""
    return randomise(RepVGG(**{**SMALL, **options}).double())


@pytest.mark.parametrize('arch', PUBLISHED)
def test_published_sizes(arch):
    head = 1000
    for form, (millions, keys) in enumerate(
        zip(PUBLISHED[arch], KEYS[arch[0]][::-1], strict=True)
    ):
        model = on_meta(RepVGG, arch, deploy=form == 0)
        width = model.get_submodule(model.stages[-1])[0].out_channels
        # The head adds a weight and a bias.
        assert len(model.state_dict()) + 2 == keys
        if millions is not None:
            count = count_parameters(model) + head * width + head
            assert abs(count / 1e6 - millions) < 0.01


@pytest.mark.parametrize(
    'arch',
    [
        a
        if a in ('A0', 'B1g2', 'D2se', 'yolox-pai-small')
        else pytest.param(a, marks=pytest.mark.long)
        for a in MMPretrainRepVGG.arch_settings
    ],
)
def test_state_dict_is_mmpretrains(arch):
    for options in (dict(), dict(deploy=True), dict(add_ppf=True)):
        ours, theirs = (on_meta(t, arch, **options) for t in (RepVGG, MMPretrainRepVGG))
        shapes = {key: tensor.shape for key, tensor in ours.state_dict().items()}
        assert shapes == {key: tensor.shape for key, tensor in theirs.state_dict().items()}


@pytest.mark.parametrize(
    ('arch', 'options'),
    [
        ('A0', dict()),
        (
            'A2',
            dict(strides=(2, 2, 1, 1), dilations=(1, 1, 2, 4), out_indices=(0, 1, 2, 3)),
        ),
        ('B1g4', dict(in_channels=5)),
        ('D2se', dict(base_channels=16)),
        ('yolox-pai-small', dict(add_ppf=True, out_indices=(2, 3))),
    ],
    ids=str,
)
def test_equals_mmpretrains(arch, options):
    options = {'base_channels': 8, **options}
    theirs = randomise(MMPretrainRepVGG(arch, **options).double())
    ours = RepVGG(arch, **options).double()
    ours.load_state_dict(theirs.state_dict())
    x = image(2, options.get('in_channels', 3), 32, 32)
    theirs.train(False)
    ours.train(False)
    assert_same(theirs(x), ours(x))


def test_trains_as_mmpretrains():
    options = dict(arch=TINY | dict(group_layer_map={2: 2}, se_cfg=dict(ratio=2)))
    options |= dict(base_channels=4, out_indices=(0, 1), strides=(2, 2), dilations=(1, 1))
    theirs = randomise(MMPretrainRepVGG(**options).double())
    ours = RepVGG(**options).double()
    ours.load_state_dict(theirs.state_dict())
    x = image(2, 3, 16, 16)
    assert_same_step(step(theirs, x), step(ours, x))


@pytest.fixture(scope='module')
def full_size() -> RepVGG:
    """RepVGG-A0 as it is published, drawn."""
    model = RepVGG('A0', out_indices=(0, 1, 2, 3))
    return randomise(model).eval()


def test_full_size_equals_timms(full_size):
    """An implementation by others, from the official code."""
    names = {
        'branch_3x3.conv': 'conv_kxk.conv',
        'branch_3x3.norm': 'conv_kxk.bn',
        'branch_1x1.conv': 'conv_1x1.conv',
        'branch_1x1.norm': 'conv_1x1.bn',
        'branch_norm': 'identity',
    }
    state = {}
    for key, tensor in full_size.state_dict().items():
        block, *index, branch, part, name = _split(key)
        if block != 'stem':
            block = f'stages.{int(block[-1]) - 1}.{index[0]}'
        part = f'{branch}.{part}' if part else branch
        state[f'{block}.{names[part]}.{name}'] = tensor
    model = timm.create_model('repvgg_a0', num_classes=0, features_only=False).eval()
    model.load_state_dict(state)
    x = image(1, 3, 64, 64, dtype=torch.float32)
    with torch.no_grad():
        assert_same(model.forward_features(x), full_size(x)[-1])


def _split(key: str) -> list[str]:
    """``stage_1.0.branch_3x3.conv.weight`` in its parts; an identity has no ``conv``."""
    parts = key.split('.')
    if 'branch_norm' in parts:
        parts.insert(-1, '')
    return parts


def test_full_size_deploy_form(full_size):
    assert_deploy_equivalent(full_size, image(1, 3, 64, 64, dtype=torch.float32))


#: What a network may be besides the published ones.
NETWORKS = {
    'plain': {},
    'groups': dict(arch=TINY | dict(group_layer_map={1: 2, 3: 2})),
    'se before act': dict(arch=TINY | dict(se_cfg=dict(ratio=2))),
    'se after act': dict(arch=TINY | dict(se_cfg=dict(ratio=2), se_position='after_act')),
    'strides': dict(strides=(1, 3)),
    'dilations': dict(dilations=(2, 4)),
    'dilation per block': dict(dilations=(2, (1, 3))),
    'pyramid pooling': dict(add_ppf=True),
    'SyncBN': dict(norm_cfg=dict(type='SyncBN')),
    'adaptive padding': dict(conv_cfg=dict(type='Conv2dAdaptivePadding')),
    'dbb': dict(block_cfg=dict(type='mmrep.DiverseBranchBlock', branches=('kxk', 'avg'))),
    'reflect': dict(block_cfg=dict(type='mmrep.RepVGGBlock', padding_mode='reflect')),
    'conv and norm': dict(block_cfg=dict(type='mmrep.ConvNormBlock', kernel_size=3)),
}


@pytest.mark.parametrize('name', NETWORKS)
def test_deploy_form(name):
    build = functools.partial(RepVGG, **SMALL | NETWORKS[name])
    deployed = assert_built_form_is_fused_one(build, image(2, 3, 23, 26))
    assert deployed.deploy


@pytest.mark.parametrize('name', [n for n in NETWORKS if n != 'conv and norm'])
def test_one_conv_in_the_train_form(name):
    assert_one_conv_exact(RepVGG(**SMALL | NETWORKS[name]).double(), image(2, 3, 23, 26))


def test_with_cp_changes_nothing():
    x = image(2, 3, 16, 16)
    assert_same_step(step(small(), x), step(small(with_cp=True), x))


def test_plus_is_five_stages_of_se_after_the_act():
    model = on_meta(RepVGG, 'plus-L2pse', out_indices=(0, 1, 2, 3, 4))
    assert [len(getattr(model, name)) for name in model.stages] == [8, 14, 12, 12, 1]
    assert {
        block.se_position for block in model.modules() if isinstance(block, RepVGGBlock)
    } == {'after_act'}
    outputs = model(torch.empty(1, 3, 64, 64, device='meta'))
    assert [tuple(y.shape[1:]) for y in outputs] == [
        (160, 16, 16),
        (320, 8, 8),
        (640, 4, 4),
        (640, 4, 4),
        (2560, 2, 2),
    ]


class TestArguments:
    @pytest.mark.parametrize(
        ('options', 'shapes'),
        [
            (dict(), [(4, 8, 8), (12, 4, 4)]),
            (dict(out_indices=(1,)), [(12, 4, 4)]),
            (dict(out_indices=[0]), [(4, 8, 8)]),
            (dict(strides=(1, 1)), [(4, 16, 16), (12, 16, 16)]),
            (dict(base_channels=8), [(8, 8, 8), (24, 4, 4)]),
            (dict(dilations=(2, (2, 4))), [(4, 8, 8), (12, 4, 4)]),
        ],
        ids=str,
    )
    def test_outputs(self, options, shapes):
        outputs = small(**options)(image(2, 3, 32, 32))
        assert isinstance(outputs, tuple)
        assert [tuple(y.shape[1:]) for y in outputs] == shapes

    def test_dilation_per_block(self):
        model = small(dilations=(1, (2, 4)))
        geometries = [block.geometry for block in model.stage_2]
        assert [geometry.dilation for geometry in geometries] == [(2, 2), (4, 4)]
        assert [geometry.padding for geometry in geometries] == [(2, 2), (4, 4)]

    @pytest.mark.parametrize(('limit', 'channels'), [(None, 64), (32, 32), (1000, 96)])
    def test_stem_channels(self, limit, channels):
        arch = (
            TINY | dict(width_factor=(1.5, 1)) | ({'stem_channels': limit} if limit else {})
        )
        assert on_meta(RepVGG, arch, out_indices=(1,)).stem.out_channels == channels

    def test_group_layer_map_counts_from_the_first_stage(self):
        model = small(arch=TINY | dict(group_layer_map={2: 4}))
        groups = [m.groups for m in model.modules() if isinstance(m, RepVGGBlock)]
        assert groups == [1, 1, 4, 1]

    def test_pyramid_pooling_of_the_last_stage(self):
        plain, pooled = small(), small(add_ppf=True)
        pooled.load_state_dict(plain.state_dict(), strict=False)
        x = image(2, 3, 32, 32)
        (first, last), (same, other) = plain.eval()(x), pooled.eval()(x)
        assert_same(first, same)
        assert_same(pooled.ppf(last), other)

    def test_block_cfg(self):
        cfg = dict(type='mmrep.DiverseBranchBlock', internal_channels=8)
        model = small(block_cfg=cfg)
        blocks = [m for m in model.modules() if isinstance(m, DiverseBranchBlock)]
        assert len(blocks) == 4
        assert {block.internal_channels for block in blocks} == {8}

    def test_tables_are_not_changed(self):
        before = repr(RepVGG.arch_settings)
        small()
        on_meta(RepVGG, 'D2se')
        assert repr(RepVGG.arch_settings) == before

    @pytest.mark.parametrize(
        ('options', 'message'),
        [
            (dict(arch='A9'), r"arch 'A9' is unknown; choose from A0, A1, .*D2se"),
            (dict(arch=dict(num_blocks=(1, 2))), 'arch lacks width_factor'),
            (dict(arch=TINY | dict(widths=3)), 'arch has unknown keys: widths; known are '),
            (dict(strides=(2, 2, 2)), r'one entry for each stage, not \[2, 2, 3, 2\]'),
            (dict(dilations=(1,)), r'one entry for each stage, not \[2, 2, 2, 1\]'),
            (dict(arch=TINY | dict(width_factor=(1,))), r'not \[2, 1, 2, 2\]'),
            (dict(out_indices=(2,)), r'out_indices=\(2,\) of 2 stages'),
            (dict(out_indices=()), r'out_indices=\(\) of 2 stages: name one or more'),
            (
                dict(dilations=(1, (2, 2, 2))),
                r'dilations \(2, 2, 2\) of a stage of 2 blocks',
            ),
            (dict(arch=TINY | dict(group_layer_map={4: 2})), 'names block 4 of only 3'),
        ],
        ids=str,
    )
    @pytest.mark.parametrize('error', [ArchitectureError, ValueError, AssertionError])
    def test_refuses(self, options, message, error):
        """As mmpretrain does, an AssertionError; and a ValueError as well."""
        with pytest.raises(error, match=message):
            RepVGG(**SMALL | options)

    @pytest.mark.parametrize('arch', [None, 3, ['A0']])
    def test_refuses_another_type(self, arch):
        with pytest.raises(TypeError, match='arch must be a name or a dict, not'):
            RepVGG(arch)

    def test_init_cfg(self):
        model = RepVGG(**SMALL)
        model.init_weights()
        assert (model.stem.branch_3x3.norm.weight == 1).all()
        weight = model.stage_2[1].branch_3x3.conv.weight
        # Kaiming, fan out: variance 2 / (9 * 12).
        assert 0.5 < weight.std().item() / (2 / (9 * 12)) ** 0.5 < 1.5


class TestTraining:
    @pytest.mark.parametrize(
        ('stages', 'names'),
        [
            (-1, set()),
            (0, {'stem'}),
            (1, {'stem', 'stage_1'}),
            (2, {'stem', 'stage_1', 'stage_2'}),
        ],
    )
    def test_frozen_stages(self, stages, names):
        """From the construction on, and after every change of the mode."""
        model = RepVGG(**SMALL, frozen_stages=stages)
        assert frozen(model) == names
        model.eval()
        assert frozen(model.train()) == names

    def test_frozen_stages_do_not_move(self):
        model = small(frozen_stages=1)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        outcome = step(model, image(2, 3, 16, 16))
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        assert {name.split('.')[0] for name in outcome['gradients']} == {'input', 'stage_2'}
        for key, tensor in model.state_dict().items():
            assert torch.equal(before[key], tensor) is not key.startswith('stage_2'), key

    def test_frozen_deploy_form(self):
        model = small(frozen_stages=1).train()
        model.switch_to_deploy()
        assert frozen(model) == {'stem', 'stage_1'}

    def test_norm_eval(self):
        model = small(norm_eval=True)
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert norms
        for _ in range(2):
            assert not any(norm.training for norm in norms)
            assert model.training and model.stage_1.training
            assert all(p.requires_grad for p in model.parameters())
            model.eval().train()

    def test_mode_returns_the_model(self):
        model = RepVGG(**SMALL)
        assert model.train() is model
        assert model.eval() is model
        assert model.train(False) is model
        assert not model.stage_2.training

    def test_deployed_model_can_be_tuned(self):
        model = small()
        model.switch_to_deploy()
        outcome = step(model, image(2, 3, 16, 16))
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained == set(dict(model.named_parameters()))
        assert outcome['gradients'].keys() == trained | {'input'}
