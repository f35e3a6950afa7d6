import pytest
import torch
from import_laws import assert_imports, import_weights
from laws import image, randomise
from official_dbb_networks import MobileNet, ResNet, in_published_names

from mmrep.errors import CheckpointError

FORMS = pytest.mark.parametrize('deploy', [False, True], ids=['train', 'deploy'])
NETWORKS = {
    'resnet18': (ResNet, dict(num_blocks=(2, 2, 2, 2), bottleneck=False), (586, 42)),
    'resnet50': (ResNet, dict(num_blocks=(3, 4, 6, 3), bottleneck=True), (784, 108)),
    'mobilenet': (MobileNet, {}, (414, 56)),
}
RESNET = dict(
    type='mmrep.DBBResNet', out_indices=(3,), style='pytorch', zero_init_residual=False
)
CONFIGS = {
    'resnet18': dict(RESNET, depth=18, base_channels=8, stem_channels=8),
    'resnet50': dict(RESNET, depth=50, base_channels=8, stem_channels=8),
    'mobilenet': dict(type='mmrep.DBBMobileNetV1', out_indices=(4,), width_factor=0.25),
}


def network(name, deploy, width=8):
    build, options, _ = NETWORKS[name]
    return randomise(build(**options, width=width, deploy=deploy)).eval()


@FORMS
@pytest.mark.parametrize(
    'published',
    [pytest.param(False, marks=pytest.mark.long), True],
    ids=['names', 'published-names'],
)
@pytest.mark.parametrize('name', NETWORKS)
def test_official_dbb(name, deploy, published, tmp_path):
    model = network(name, deploy)
    weights = in_published_names(model.state_dict()) if published else model.state_dict()
    x = image(2, 3, 64, 64, dtype=torch.float32)
    done = assert_imports(model, weights, x, tmp_path, 'dbb')
    assert done.backbone == {**CONFIGS[name], **(dict(deploy=True) if deploy else {})}
    assert done.used == len(weights)


@pytest.mark.parametrize('name', NETWORKS)
def test_that_the_sources_have_the_published_layout(name):
    sizes = tuple(len(network(name, deploy).state_dict()) for deploy in (False, True))
    assert sizes == NETWORKS[name][2]


def test_published_names_differ():
    state = network('resnet18', False).state_dict()
    assert len(in_published_names(state).keys() & state.keys()) < len(state) / 2 + 200


def test_full_width_needs_no_numbers(tmp_path):
    done = import_weights(network('mobilenet', True, 32).state_dict(), tmp_path)
    config = dict(type='mmrep.DBBMobileNetV1', out_indices=(4,), deploy=True)
    assert done.backbone == config


@pytest.mark.parametrize('name', NETWORKS)
def test_arch_is_checked(name, tmp_path):
    weights = network(name, True).state_dict()
    done = import_weights(weights, tmp_path, arch=name)
    assert done.backbone == dict(CONFIGS[name], deploy=True)
    with pytest.raises(CheckpointError, match='leave --arch resnet34 out'):
        import_weights(weights, tmp_path, arch='resnet34')


def test_other_depths_are_refused(tmp_path):
    weights = randomise(ResNet((1, 1, 1, 1), False, 8, deploy=True)).state_dict()
    with pytest.raises(CheckpointError, match=r'no ResNet has \(1, 1, 1, 1\) basic blocks'):
        import_weights(weights, tmp_path)
