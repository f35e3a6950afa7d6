import pytest
import torch
from import_laws import assert_imports, features_of, import_weights
from laws import assert_same, image, on_meta, randomise
from official_unireplknet import UniRepLKNet

from mmrep.importers.unireplknet import UNIREPLKNET
from mmrep.importers.unireplknet_config import unireplknet_config
from mmrep.models import backbones

FORMS = pytest.mark.parametrize('deploy', [False, True], ids=['train', 'deploy'])
TINY = dict(dims=(8, 12, 16, 24), sizes=((3,), (7, 5), (13, 3, 7), (13,)))
FOUND = dict(channels=TINY['dims'], kernel_sizes=TINY['sizes'])


def x():
    return image(2, 3, 64, 64, dtype=torch.float32)


def full_size(name: str) -> dict:
    settings = backbones.UniRepLKNet.arch_settings[name]
    return dict(dims=settings['channels'], sizes=settings['kernel_sizes'])


@FORMS
@pytest.mark.parametrize(
    ('architecture', 'arch'), [(full_size('A'), 'A'), (TINY, FOUND)], ids=['A', 'own']
)
def test_classifier(architecture, arch, deploy, tmp_path):
    model = randomise(UniRepLKNet(**architecture, deploy=deploy)).eval()
    weights = dict(model=model.state_dict())
    done = assert_imports(model, weights, x(), tmp_path, 'unireplknet')
    form = dict(deploy=True) if deploy else {}
    assert done.backbone == dict(
        type='mmrep.UniRepLKNet', arch=arch, out_indices=(3,), **form
    )
    assert done.used == len(model.state_dict()) and not done.left_out


@FORMS
def test_features(deploy, tmp_path):
    """As of a detector or a segmentor: every stage's, each after a norm."""
    model = randomise(UniRepLKNet(**TINY, num_classes=None, deploy=deploy)).eval()
    done = import_weights(model.state_dict(), tmp_path)
    assert done.backbone['out_indices'] == (0, 1, 2, 3) and done.head is None
    assert done.backbone['gap_before_final_norm'] is False
    with torch.no_grad():
        assert_same(model(x()), features_of(done.out, x()))


@FORMS
@pytest.mark.parametrize(
    'name',
    [
        n if n in 'AFPNT' else pytest.param(n, marks=pytest.mark.long)
        for n in backbones.UniRepLKNet.arch_settings
    ],
)
def test_named_architectures_are_recognised(name, deploy):
    state = on_meta(backbones.UniRepLKNet, name, deploy=deploy).state_dict()
    expected = dict(type='mmrep.UniRepLKNet', arch=name, out_indices=(3,))
    assert unireplknet_config(state, UNIREPLKNET) == expected


def test_another_image():
    state = on_meta(backbones.UniRepLKNet, FOUND, in_channels=4).state_dict()
    found = unireplknet_config(state, UNIREPLKNET)
    assert found['in_channels'] == 4 and found['arch'] == FOUND
