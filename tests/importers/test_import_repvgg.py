import pytest
import torch
from import_laws import assert_imports, backbone_of, features_of, import_weights, without
from laws import assert_same, image, randomise
from official_repvgg import RepVGG, RepVGGplus

from mmrep.importers.mmpretrain import MMPRETRAIN
from mmrep.importers.repvgg import REPVGG
from mmrep.importers.repvgg_config import repvgg_config
from mmrep.importers.repvggplus import REPVGGPLUS
from mmrep.models import backbones
from mmrep.registry import MODELS

FORMS = pytest.mark.parametrize('deploy', [False, True], ids=['train', 'deploy'])
TINY = dict(num_blocks=(1, 3, 2, 1), widths=(16, 24, 32, 64))
TINY_ARCH = dict(num_blocks=(1, 3, 2, 1), width_factor=(0.25, 0.1875, 0.125, 0.125))
A0 = dict(num_blocks=(2, 4, 14, 1), widths=(48, 96, 192, 1280))


def x(size=32):
    return image(2, 3, size, size, dtype=torch.float32)


@FORMS
@pytest.mark.parametrize(
    ('architecture', 'arch'),
    [
        (A0, 'A0'),
        (TINY, TINY_ARCH),
        (
            dict(TINY, groups={2: 2, 4: 4, 6: 8}),
            dict(TINY_ARCH, group_layer_map={2: 2, 4: 4, 6: 8}),
        ),
        (dict(TINY, se=8), dict(TINY_ARCH, se_cfg=dict(ratio=8, divisor=1))),
    ],
    ids=['A0', 'own', 'groups', 'se'],
)
def test_official_repvgg(architecture, arch, deploy, tmp_path):
    model = randomise(RepVGG(**architecture, deploy=deploy)).eval()
    # As its training script saves it.
    weights = {f'module.{key}': value for key, value in model.state_dict().items()}
    weights = dict(state_dict=weights, epoch=3)
    done = assert_imports(model, weights, x(), tmp_path, 'repvgg')
    assert done.backbone == dict(
        type='mmrep.RepVGG',
        arch=arch,
        out_indices=(3,),
        **(dict(deploy=True) if deploy else {}),
    )
    assert done.used == len(model.state_dict()) and not done.left_out


@FORMS
def test_official_repvggplus(deploy, tmp_path):
    pytest.importorskip('mmpretrain.models')
    model = RepVGGplus((1, 2, 4, 1), (16, 24, 32, 64), deploy=deploy)
    randomise(model).eval()
    done = import_weights(dict(model=model.state_dict()), tmp_path)
    assert done.layout == 'repvggplus'
    assert done.backbone['arch'] == dict(
        num_blocks=(1, 2, 2, 2, 1),
        width_factor=(0.25, 0.1875, 0.125, 0.0625, 0.0625),
        se_cfg=dict(ratio=4, divisor=1),
        se_position='after_act',
        strides=(2, 2, 2, 1, 2),
    )
    assert done.backbone['out_indices'] == ((4,) if deploy else (0, 1, 2, 4))

    with torch.no_grad():
        expected = model(x())
        features = features_of(done.out, x())
    state = torch.load(done.out, weights_only=True)['state_dict']
    config = dict(done.head, _scope_='mmpretrain')
    head = MODELS.build(config).eval()
    head.load_state_dict(without('head.', state), strict=True)
    with torch.no_grad():
        logits = {'main': head(features)}
        for i in range(0 if deploy else 3):
            mean = head.aux_convs[i](features[i]).mean((2, 3))
            logits[RepVGGplus.auxiliary[i]] = head.aux_heads[i].fc(mean)
    assert_same(expected, logits)
    assert len(expected) == (1 if deploy else 4)
    assert head.deploy == deploy
    if not deploy:
        weights = [h['loss']['loss_weight'] for h in done.head['auxiliary_heads']]
        assert weights == [0.1] * 3
        assert [h['in_channels'] for h in done.head['auxiliary_heads']] == [16, 24, 32]


@pytest.mark.parametrize(
    ('num_blocks', 'options', 'keys'),
    [
        ((2, 4, 14, 1), {}, (351, 46)),
        ((4, 6, 16, 1), {}, (453, 58)),
        ((8, 14, 24, 1), dict(se=16), (985, 290)),
    ],
    ids=['A', 'B', 'D2se'],
)
def test_that_the_sources_have_the_published_layout(num_blocks, options, keys):
    widths = (16,) * 4
    models = [RepVGG(num_blocks, widths, deploy=d, **options) for d in (False, True)]
    assert tuple(len(model.state_dict()) for model in models) == keys


def architecture_of(arch, layout):
    """The architecture that is read from the shapes of a network's deploy form."""
    with torch.device('meta'):
        state = backbones.RepVGG(arch, deploy=True).state_dict()
    return repvgg_config(state, layout)['arch']


@pytest.mark.parametrize('name', backbones.RepVGG.arch_settings)
def test_named_architectures_are_recognised(name):
    layout = REPVGGPLUS if name == 'plus-L2pse' else REPVGG
    assert architecture_of(name, layout) == name
    assert architecture_of(name, MMPRETRAIN) == name


@pytest.mark.parametrize(
    ('name', 'changes'),
    [
        ('yolox-pai-small', dict(stem_channels=48)),
        ('A0', dict(stem_channels=32)),
        ('B1g4', dict(group_layer_map={2: 4})),
        ('B1', dict(width_factor=(2, 2, 2, 4.5))),
        ('D2se', dict(se_cfg=dict(ratio=8, divisor=1))),
        ('D2se', dict(num_blocks=(8, 14, 23, 1))),
    ],
)
def test_changed_architectures_are_not_the_named_ones(name, changes):
    arch = {**backbones.RepVGG.arch_settings[name], **changes}
    arch = {key: value for key, value in arch.items() if value is not None}
    assert architecture_of(arch, REPVGG) == arch


def test_the_place_of_se_layers_is_told_by_the_layout():
    arch = dict(backbones.RepVGG.arch_settings['plus-L2pse'], num_blocks=(1,) * 5)
    found = architecture_of(arch, REPVGGPLUS)
    assert found['se_position'] == 'after_act' and found['strides'] == (2, 2, 2, 1, 2)
    assert 'se_position' not in architecture_of(arch, MMPRETRAIN)


def test_a_stem_and_an_image_of_another_width(tmp_path):
    arch = dict(num_blocks=(1, 1), width_factor=(0.25, 0.25), stem_channels=8)
    model = randomise(backbones.RepVGG(arch, in_channels=4, out_indices=(1,)))
    weights = {f'backbone.{key}': value for key, value in model.state_dict().items()}
    done = import_weights(weights, tmp_path)
    assert done.backbone == dict(
        type='mmrep.RepVGG', arch=arch, out_indices=(1,), in_channels=4
    )
    assert done.head is None
    inputs = image(1, 4, 16, 16, dtype=torch.float32)
    with torch.no_grad():
        assert_same(model.eval()(inputs), backbone_of(done.out)(inputs))
