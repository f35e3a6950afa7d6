import pytest
import torch
from laws import assert_same
from mmengine.config import Config
from mmpretrain.models import ResNet
from processes import run_python
from test_deploying import DBB, Project
from tiny_projects import (
    DBB_RESNET,
    ONE_SWITCH,
    REPVGG,
    classifier_model,
    segmentor_model,
)

from mmrep.deployment import VerificationError, build_model, read_config
from mmrep.deployment.config import registered
from mmrep.errors import CheckpointError, ConfigError
from mmrep.hosts import forward
from mmrep.reparam import branch_by_branch

SE = dict(REPVGG['arch'], se_cfg=dict(ratio=4, divisor=1))
MOBILEONE = dict(
    type='mmrep.MobileOne',
    arch=dict(
        num_blocks=(1, 2, 1, 1),
        width_factor=(0.125, 0.0625, 0.0625, 0.03125),
        num_conv_branches=(1, 2, 1, 1),
        num_se_blocks=(0, 1, 0, 1),
    ),
    se_cfg=dict(ratio=4, divisor=1),
)
REPLKNET = dict(ONE_SWITCH['RepLKNet'], type='mmrep.RepLKNet')
RESNET50 = dict(DBB_RESNET, depth=50)

#: Models of mmrep's bodies: the scope, the config, and the type of the host's body.
BODIES = {
    'RepVGG': ('mmpretrain', classifier_model(), 'RepVGG'),
    'RepVGG of SyncBN': (
        'mmseg',
        segmentor_model(dict(REPVGG, norm_cfg=dict(type='SyncBN', requires_grad=True))),
        'mmpretrain.RepVGG',
    ),
    'MobileOne with SE': ('mmpretrain', classifier_model(MOBILEONE), 'MobileOne'),
    'MobileOne of SyncBN': (
        'mmseg',
        segmentor_model(dict(MOBILEONE, norm_cfg=dict(type='SyncBN'))),
        'mmpretrain.MobileOne',
    ),
    'RepLKNet': ('mmpretrain', classifier_model(REPLKNET), 'RepLKNet'),
    'RepLKNet of two stages': (
        'mmpretrain',
        classifier_model(
            dict(
                REPLKNET,
                arch=dict(
                    REPLKNET['arch'],
                    large_kernel_sizes=(9, 7),
                    layers=(1, 2),
                    channels=(8, 16),
                ),
                strides=(2, 2),
                dilations=(1, 1),
                out_indices=1,
            )
        ),
        'RepLKNet',
    ),
    'RepLKNet of SyncBN': (
        'mmseg',
        segmentor_model(
            dict(
                REPLKNET,
                norm_cfg=dict(type='SyncBN', requires_grad=True),
                strides=[2, 2, 2, 2],
                out_indices=(-2, -1),
                frozen_stages=9,
            )
        ),
        'mmpretrain.RepLKNet',
    ),
    'RepVGG segmentor': ('mmseg', segmentor_model(), 'mmpretrain.RepVGG'),
    'DBB-ResNet-18': ('mmpretrain', classifier_model(DBB_RESNET, 32), 'ResNet'),
    'DBB-ResNet-50 of one output': (
        'mmpretrain',
        classifier_model(dict(RESNET50, out_indices=(3,)), 128),
        'ResNet',
    ),
    'DBB-ResNetV1d-50': (
        'mmpretrain',
        classifier_model(dict(RESNET50, type='mmrep.DBBResNetV1d'), 128),
        'ResNetV1d',
    ),
    'DBB-ResNetV1c classifier': (
        'mmpretrain',
        classifier_model(dict(DBB_RESNET, type='mmrep.DBBResNetV1c'), 32),
        'ResNetV1c',
    ),
    'DBB-ResNet with pooling': (
        'mmpretrain',
        classifier_model(dict(DBB_RESNET, avg_down=True, strides=(1, 2, 2, 1)), 32),
        'ResNet',
    ),
    'DBB-ResNetV1c segmentor': (
        'mmseg',
        segmentor_model(
            dict(DBB_RESNET, type='mmrep.DBBResNetV1c', multi_grid=(1, 2)), in_channels=4
        ),
        'ResNetV1c',
    ),
    'ReparamResNet of RepVGG blocks': (
        'mmpretrain',
        classifier_model(
            dict(
                DBB_RESNET,
                type='mmrep.ReparamResNet',
                block_cfg=dict(type='mmrep.RepVGGBlock'),
                with_cp=True,
            ),
            32,
        ),
        'ResNet',
    ),
    'DBB-VGG-11': (
        'mmpretrain',
        classifier_model(dict(type='mmrep.DBBVGG', depth=11, with_cp=True), 512),
        'VGG',
    ),
    'DBB-VGG-16': ('mmpretrain', classifier_model(dict(type='mmrep.DBBVGG'), 512), 'VGG'),
}

#: Runs a written pair on an input, where mmrep cannot be imported.
STOCK = """
import sys
sys.modules['mmrep'] = None
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
config, checkpoint, x, out = sys.argv[1:]
config = Config.fromfile(config)
init_default_scope(config.default_scope)
model = MODELS.build(config.model)
model.eval()
model.load_state_dict(torch.load(checkpoint, weights_only=True)['state_dict'], strict=True)
model.double()
with torch.no_grad():
    torch.save(model(torch.load(x), mode='tensor'), out)
assert not [name for name in sys.modules if name.startswith('mmrep.')]
"""


def project_of(folder, name: str) -> Project:
    scope, model, _ = BODIES[name]
    of_scope = {'mmpretrain': 'RepVGG classifier', 'mmseg': 'RepVGG segmentor'}
    return Project(folder, of_scope[scope], **model)


@pytest.mark.parametrize(
    'name',
    [pytest.param(n, marks=pytest.mark.long) if 'VGG-1' in n else n for n in BODIES],
)
def test_becomes_the_host_s(tmp_path, name):
    project = project_of(tmp_path, name)
    done = project.deploy(host=True, shape=(3, 64, 64))
    assert 'mmrep' not in done.out_config.read_text()
    config = read_config(done.out_config)
    assert config.model.backbone.type == BODIES[name][2]
    model = build_model(config)
    assert all(type(m).__module__.split('.')[0] != 'mmrep' for m in model.modules())
    state_dict = torch.load(done.out, weights_only=True)['state_dict']
    model.load_state_dict(state_dict, strict=True)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad(), branch_by_branch(project.model):
        assert_same(forward(project.model, x), forward(model, x), 2e-5)


@pytest.mark.parametrize(
    'name', [pytest.param('RepVGG segmentor', marks=pytest.mark.long), 'DBB-ResNet-18']
)
def test_where_mmrep_is_not_installed(tmp_path, name):
    project = project_of(tmp_path, name)
    done = project.deploy(host=True, shape=(3, 64, 64))
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.save(x, tmp_path / 'x.pth')
    files = (done.out_config, done.out, tmp_path / 'x.pth', tmp_path / 'out.pth')
    ran = run_python('-c', STOCK, *files, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    with torch.no_grad():
        expected = forward(project.model.double(), x)
    # The weights that were written are of float32.
    assert_same(expected, torch.load(tmp_path / 'out.pth'), 1e-5)


def test_without_host_it_is_ours(tmp_path):
    done = project_of(tmp_path, 'DBB-ResNet-18').deploy()
    assert read_config(done.out_config).model.backbone.type == 'mmrep.DBBResNet'


def test_a_host_s_model_stays(tmp_path):
    project = Project(tmp_path, "mmpretrain's RepVGG")
    done = project.deploy(host=True)
    assert read_config(done.out_config).model.backbone.type == 'mmpretrain.RepVGG'


@pytest.mark.parametrize(
    'backbone, says',
    [
        (dict(type='mmrep.DBBMobileNetV1', width_factor=0.125), 'no host has a body like'),
        (
            dict(type='mmrep.DBBVGG', base_channels=8),
            r'VGG has no counterpart of base_channels=8 of mmrep\.DBBVGG',
        ),
        (dict(REPVGG, block_cfg=DBB), r'block_cfg=.* of mmrep\.RepVGG: '),
        (dict(REPVGG, block_cfg=None), 'block_cfg=None of mmrep'),
        (
            dict(MOBILEONE, reparam_kernels=[1], strides=(2, 2, 1, 2)),
            r'strides=\(2, 2, 1, 2\), reparam_kernels=\[1\] of mmrep\.MobileOne',
        ),
        (
            dict(REPLKNET, strides=[2, 2, 2, 1], act_cfg=dict(type='GELU')),
            r"strides=\[2, 2, 2, 1\], act_cfg={'type': 'GELU'} of mmrep\.RepLKNet",
        ),
        (dict(REPLKNET, norm_cfg=dict(type='BN', eps=1e-3)), 'norm_cfg=.* of mmrep'),
        (dict(REPLKNET, ffn_act_cfg=dict(type='ReLU')), 'ffn_act_cfg=.* of mmrep'),
        (dict(DBB_RESNET, depth=50, plugins=[]), r'ResNet has no counterpart of plugins'),
    ],
)
def test_what_no_host_has(tmp_path, backbone, says):
    project = Project(tmp_path, **classifier_model(backbone))
    with pytest.raises(ConfigError, match=f'{says}.*leave --host out'):
        project.deploy(host=True)
    assert project.written() == []


def test_no_host(tmp_path, monkeypatch):
    project = Project(tmp_path, 'bare backbone', **DBB_RESNET)
    monkeypatch.setattr(
        'mmrep.deployment.host.registered',
        lambda node: registered(node) if 'mmrep' in node['type'] else None,
    )
    with pytest.raises(ConfigError, match='neither mmengine nor mmpretrain has a ResNet'):
        project.deploy(host=True)


def test_another_function(tmp_path, monkeypatch):
    """The host's body is not taken for the same by its names alone."""
    project = project_of(tmp_path, 'DBB-ResNet-18')
    run = ResNet.forward
    monkeypatch.setattr(
        ResNet, 'forward', lambda *args: tuple(1.01 * y for y in run(*args))
    )
    with pytest.raises(VerificationError, match=r"from the config's model.*leave --host"):
        project.deploy(host=True)
    assert project.written() == []


def test_a_host_s_fault(tmp_path):
    """mmpretrain's deploy form leaves the SE layer out."""
    project = Project(tmp_path, **classifier_model(dict(REPVGG, arch=SE)))
    with pytest.raises(VerificationError, match='from its branches'):
        project.deploy(host=True)
    assert project.written() == []


def test_weights_of_another_model(tmp_path):
    project = project_of(tmp_path, 'DBB-ResNet-18')
    project.save({'a': torch.ones(1)})
    with pytest.raises(CheckpointError, match='does not fit the config'):
        project.deploy(host=True)


def test_ours_are_left_out(tmp_path):
    project = project_of(tmp_path, 'DBB-ResNet-18')
    project.config.merge_from_dict(
        dict(
            custom_imports=dict(imports=['mmrep', 'math']),
            custom_hooks=[dict(type='mmrep.PlainCheckpointHook'), dict(type='EMAHook')],
        )
    )
    done = project.deploy(host=True)
    config = Config.fromfile(done.out_config)
    assert config.custom_imports.imports == ['math']
    assert config.custom_hooks == [dict(type='EMAHook')]
