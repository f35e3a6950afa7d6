import pytest
import timm
import torch
from import_laws import assert_imports, import_weights
from laws import image, on_meta, randomise
from official_mobileone import MobileOne
from timm.utils.model import reparameterize_model

from mmrep.errors import CheckpointError
from mmrep.importers.mobileone import MOBILEONE
from mmrep.importers.mobileone_config import mobileone_config
from mmrep.models import backbones
from mmrep.registry import MODELS

pytest.importorskip('mmpretrain.models')
from mmengine.registry import DefaultScope
from mmpretrain.models import ImageClassifier

FORMS = pytest.mark.parametrize('deploy', [False, True], ids=['train', 'deploy'])
NUM_BLOCKS = (2, 8, 10, 1)
S0 = dict(num_blocks=NUM_BLOCKS, widths=(48, 128, 256, 1024), branches=4)
TINY = dict(num_blocks=(1, 2, 1, 1), widths=(16, 32, 32, 64))


def arch(branches=1, num_se=(0, 0, 0, 0), factors=(0.25, 0.25, 0.125, 0.125)):
    return dict(
        num_blocks=(1, 2, 1, 1),
        width_factor=factors,
        num_conv_branches=(branches,) * 4,
        num_se_blocks=num_se,
    )


def x():
    return image(2, 3, 64, 64, dtype=torch.float32)


@FORMS
@pytest.mark.parametrize(
    ('architecture', 'found'),
    [
        (S0, dict(arch='s0')),
        (TINY, dict(arch=arch())),
        (dict(TINY, branches=3), dict(arch=arch(branches=3))),
        (
            dict(TINY, num_se=(0, 1, 0, 1)),
            dict(arch=arch(num_se=(0, 1, 0, 1)), se_cfg=dict(ratio=16, divisor=1)),
        ),
        # Nobody else has a stem of more than 64 channels.
        (
            dict(TINY, widths=(80, 160, 32, 64)),
            dict(arch=arch(factors=(1.25, 1.25, 0.125, 0.125))),
        ),
    ],
    ids=['S0', 'own', 'branches', 'se', 'wide'],
)
def test_official_mobileone(architecture, found, deploy, tmp_path):
    model = randomise(MobileOne(**architecture, deploy=deploy)).eval()
    done = assert_imports(model, model.state_dict(), x(), tmp_path, 'mobileone')
    if deploy:
        found = dict(found, deploy=True)
        if found['arch'] != 's0':
            # A deploy form had any number.
            found['arch'] = dict(found['arch'], num_conv_branches=(1,) * 4)
    assert done.backbone == dict(type='mmrep.MobileOne', out_indices=(3,), **found)
    assert done.used == len(model.state_dict()) and not done.left_out


@FORMS
@pytest.mark.parametrize(
    'name', ['s0', *(pytest.param(n, marks=pytest.mark.long) for n in ('s1', 's4'))]
)
def test_timm(name, deploy, tmp_path):
    """At full size: an implementation by others, from the official code."""
    model = randomise(timm.create_model(f'mobileone_{name}', num_classes=10)).eval()
    if deploy:
        model = reparameterize_model(model)
    done = assert_imports(model, model.state_dict(), x(), tmp_path, 'timm-mobileone')
    assert done.backbone['arch'] == name
    assert done.backbone.get('deploy', False) == deploy
    assert done.used == len(model.state_dict())


@FORMS
def test_mmpretrain(deploy, tmp_path):
    own = {
        'num_blocks': [1, 2, 1, 1],
        'width_factor': [0.25, 0.25, 0.125, 0.125],
        'num_conv_branches': [1, 3, 2, 1],
        'num_se_blocks': [0, 1, 0, 1],
    }
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = ImageClassifier(
            backbone=dict(
                type='mmpretrain.MobileOne', arch=own, se_cfg=dict(ratio=4), in_channels=3
            ),
            neck=dict(type='mmpretrain.GlobalAveragePooling'),
            head=dict(type='mmpretrain.LinearClsHead', num_classes=10, in_channels=64),
        )
    # Of a network that its train() does not return.
    randomise(model)
    model.eval()
    if deploy:
        model.backbone.switch_to_deploy()
    weights = dict(state_dict=model.state_dict(), meta=dict(epoch=3))
    done = assert_imports(model, weights, x(), tmp_path, 'mmpretrain-mobileone')
    found = {key: tuple(value) for key, value in own.items()}
    if deploy:
        found['num_conv_branches'] = (1,) * 4
    assert done.backbone['arch'] == found
    assert done.backbone['se_cfg'] == dict(ratio=4, divisor=1)
    again = import_weights(torch.load(done.out, weights_only=True), tmp_path)
    assert again.backbone == done.backbone and again.layout == done.layout


@pytest.mark.parametrize(
    ('num_se', 'branches'), [((0, 0, 0, 0), 4), ((0, 0, 5, 1), 1)], ids=['S0', 'S4']
)
def test_that_the_sources_have_as_many_keys_as_mmpretrains(num_se, branches):
    widths = (16,) * 4
    ours = dict(
        num_blocks=NUM_BLOCKS,
        width_factor=(0.25, 0.125, 0.0625, 0.03125),
        num_conv_branches=(branches,) * 4,
        num_se_blocks=num_se,
    )
    for deploy in (False, True):
        official = MobileOne(NUM_BLOCKS, widths, branches, num_se, deploy).state_dict()
        own = on_meta(backbones.MobileOne, ours, deploy=deploy).state_dict()
        assert len(official) - 2 == len(own)


@FORMS
@pytest.mark.parametrize('name', backbones.MobileOne.arch_settings)
def test_named_architectures_are_recognised(name, deploy):
    state = on_meta(backbones.MobileOne, name, deploy=deploy).state_dict()
    expected = dict(type='mmrep.MobileOne', arch=name, out_indices=(3,))
    assert mobileone_config(state, MOBILEONE) == expected


@pytest.mark.parametrize(
    ('changes', 'options'),
    [
        (dict(num_se_blocks=(0, 0, 4, 1)), {}),
        (dict(num_conv_branches=(1, 1, 2, 1)), {}),
        (dict(num_blocks=(2, 8, 9, 1)), {}),
        ({}, dict(se_cfg=dict(ratio=8, divisor=1))),
        ({}, dict(in_channels=4)),
        ({}, dict(base_channels=32)),
    ],
    ids=str,
)
def test_changed_architectures_are_not_the_named_ones(changes, options):
    settings = {**backbones.MobileOne.arch_settings['s4'], **changes}
    state = on_meta(backbones.MobileOne, settings, **options).state_dict()
    found = mobileone_config(state, MOBILEONE)
    named = not changes and 'base_channels' not in options
    expected = dict(type='mmrep.MobileOne', arch='s4' if named else settings)
    assert found == expected | dict(out_indices=(3,), **options)


@pytest.mark.parametrize('stage', ['stage1.100000', 'stage1.900000000', 'stage4.1000'])
def test_blocks_that_are_missing_are_not_built(stage, tmp_path):
    """A number in a key costs nothing."""
    weights = MobileOne(**TINY).state_dict()
    weights[f'{stage}.rbr_conv.0.conv.weight'] = torch.zeros(4, 4, 1, 1)
    first = f'{stage[:6]}.{2 * TINY["num_blocks"][int(stage[5]) - 1]}'
    with pytest.raises(CheckpointError, match=rf'block {first} is missing'):
        import_weights(weights, tmp_path)


def test_stages_that_are_missing_are_not_built(tmp_path):
    model = backbones.MobileOne(arch(), out_indices=3)
    weights = {f'backbone.{key}': value for key, value in model.state_dict().items()}
    key = 'backbone.stage900000000.0.branch_conv_list.0.conv.weight'
    weights[key] = torch.zeros(4, 4, 1, 1)
    with pytest.raises(CheckpointError, match=r'block stage5\.0 is missing'):
        import_weights(weights, tmp_path)


def test_every_width_has_a_factor():
    """Also where the quotient is a little less, and would be cut off."""
    base = 56
    # 488 is one of them.
    for width in range(440, 496, 8):
        settings = dict(
            num_blocks=(1, 1),
            width_factor=(1, (width + 0.5) / (2 * base)),
            num_conv_branches=(1, 1),
            num_se_blocks=(0, 0),
        )
        model = on_meta(backbones.MobileOne, settings, base_channels=base, out_indices=1)
        found = mobileone_config(model.state_dict(), MOBILEONE)
        again = on_meta(MODELS.build, found)
        assert again.stage2[-1].out_channels == width == model.stage2[-1].out_channels
