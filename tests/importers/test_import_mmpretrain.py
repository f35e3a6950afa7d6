import pytest
import torch
from import_laws import assert_imports, import_weights
from laws import image, randomise
from mmengine.registry import DefaultScope

pytest.importorskip('mmpretrain.models')
from mmpretrain.models import ImageClassifier

ARCH = dict(
    num_blocks=(1, 2, 1, 1),
    width_factor=(0.25, 0.25, 0.125, 0.125),
    group_layer_map={2: 2},
    se_cfg=None,
)
FOUND = {key: value for key, value in ARCH.items() if value}


def classifier(arch=ARCH, width=64, **options):
    # Whatever scope a test before this one has entered.
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return ImageClassifier(
            backbone=dict(type='mmpretrain.RepVGG', arch=arch, out_indices=(3,), **options),
            neck=dict(type='mmpretrain.GlobalAveragePooling'),
            head=dict(type='mmpretrain.LinearClsHead', num_classes=10, in_channels=width),
        )


def x():
    return image(2, 3, 64, 64, dtype=torch.float32)


@pytest.mark.parametrize('deploy', [False, True], ids=['train', 'deploy'])
@pytest.mark.parametrize(
    ('options', 'found'),
    [
        ({}, dict(arch=FOUND)),
        (
            dict(arch='yolox-pai-small', width=512, add_ppf=True),
            dict(arch='yolox-pai-small', add_ppf=True),
        ),
    ],
    ids=['own', 'yolox-pai-small'],
)
def test_mmpretrain(options, found, deploy, tmp_path):
    model = randomise(classifier(**options)).eval()
    if deploy:
        model.backbone.switch_to_deploy()
        found = dict(found, deploy=True)
    meta = dict(dataset_meta=dict(classes=['a', 'b']), epoch=3, cfg='a = 1')
    weights = dict(state_dict=model.state_dict(), meta=meta, optimizer=dict(lr=0.1))
    done = assert_imports(model, weights, x(), tmp_path, 'mmpretrain')
    assert done.backbone == dict(type='mmrep.RepVGG', out_indices=(3,), **found)
    kept = torch.load(done.out, weights_only=True)['meta']
    assert kept['dataset_meta'] == meta['dataset_meta'] and kept['epoch'] == 3
    assert 'cfg' not in kept


def test_strides_that_identity_branches_tell(tmp_path):
    model = randomise(classifier(strides=(1, 2, 1, 2))).eval()
    done = assert_imports(model, model.state_dict(), x(), tmp_path, 'mmpretrain')
    assert done.backbone['strides'] == (1, 2, 1, 2)


@pytest.mark.parametrize('se_cfg', [dict(ratio=8, divisor=1), dict(ratio=4, divisor=8)])
def test_se(se_cfg, tmp_path):
    # Its deploy form drops the SE layers' work.
    model = randomise(classifier(dict(ARCH, se_cfg=se_cfg))).eval()
    done = assert_imports(model, model.state_dict(), x(), tmp_path, 'mmpretrain')
    assert done.backbone['arch'] == dict(FOUND, se_cfg=se_cfg)


def test_mmcls(tmp_path):
    """mmcls 0.x: of several GPUs, with the averages that mmcv 1.x keeps as buffers."""
    model = randomise(classifier()).eval()
    state = model.state_dict()
    averages = {f'ema_{key.replace(".", "_")}': value + 1 for key, value in state.items()}
    weights = {f'module.{key}': value for key, value in {**state, **averages}.items()}
    weights = dict(state_dict=weights, meta=dict(CLASSES=('a', 'b')))
    done = assert_imports(model, weights, x(), tmp_path, 'mmpretrain')
    assert done.used == len(state)
    assert done.left_out == {'buffers of EMAHook': len(averages)}
    assert torch.load(done.out, weights_only=True)['meta']['CLASSES'] == ('a', 'b')


def test_importing_twice_changes_nothing(tmp_path):
    model = randomise(classifier())
    once = import_weights(model.state_dict(), tmp_path)
    first = torch.load(once.out, weights_only=True)
    twice = import_weights(first, tmp_path)
    second = torch.load(twice.out, weights_only=True)
    assert once.backbone == twice.backbone
    assert first['state_dict'].keys() == second['state_dict'].keys()
    for key, value in first['state_dict'].items():
        assert torch.equal(value, second['state_dict'][key])
