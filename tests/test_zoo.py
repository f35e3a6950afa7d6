"""Networks by the names of their configs."""

import subprocess
import sys

import pytest
import torch
from laws import assert_same, image, randomise
from torch import nn

import mmrep
from mmrep.checkpoints import write_checkpoint
from mmrep.deployment import config_of, list_models
from mmrep.errors import CheckpointError, UserError
from mmrep.models.backbones import RepVGG
from mmrep.reparam import reparam_blocks, switch_to_deploy

TINY = 'repvgg-tiny_1xb64_digits'


def test_names():
    names = mmrep.list_models()
    assert names == sorted(names) and len(set(names)) == len(names) > 150
    assert all(config_of(name).stem == name for name in names)
    assert mmrep.list_models('mobileone-s?_8xb32_in1k') == [
        f'mobileone-s{size}_8xb32_in1k' for size in range(5)
    ]
    assert list_models('none*') == []


@pytest.mark.parametrize(
    ('short', 'name'),
    [
        ('repvgg-a0', 'repvgg-a0_8xb32_in1k'),
        ('repvgg-b1_custom-l2', 'repvgg-b1_custom-l2_8xb32_in1k'),
        ('replknet-31b', 'replknet-31b_32xb64_in1k'),
    ],
)
def test_the_beginning_of_a_classifier_s_name(short, name):
    assert config_of(short).stem == name


@pytest.mark.parametrize(
    ('name', 'near'),
    [
        ('vgg-b2g', 'choose from mo-repvgg-b2g2_8xb32_in1k, '),
        ('xyz', 'choose from those of mmrep.list_models'),
        ('replknet-31.', 'choose from those'),
        ('', 'choose from acb-resnet18'),
    ],
)
def test_no_such_name(name, near):
    with pytest.raises(UserError, match=f'there is no network {name!r}: {near}'):
        mmrep.get_model(name)


def test_a_beginning_of_two_names(monkeypatch, tmp_path):
    (tmp_path / 'net').mkdir()
    for name in ('net_8xb32_in1k.py', 'net_4xb64_in1k.py'):
        (tmp_path / 'net' / name).touch()
    monkeypatch.setattr('mmrep.deployment.shipped_files.shipped', lambda name: tmp_path)
    says = "no network 'net': choose from net_4xb64_in1k, net_8xb32_in1k"
    with pytest.raises(UserError, match=says):
        config_of('net')
    assert config_of('net_8xb32_in1k') == tmp_path / 'net' / 'net_8xb32_in1k.py'


def test_random_weights_are_those_of_the_config(capfd):
    pytest.importorskip('mmpretrain')
    torch.manual_seed(0)
    model = mmrep.get_model(TINY)
    assert type(model).__name__ == 'ImageClassifier' and not model.training
    assert len(reparam_blocks(model)) == 8
    # Kaiming's initialization by the fan-out, not torch's default.
    weight = model.backbone.stage_4[0].branch_3x3.conv.weight
    assert weight.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.1)
    assert capfd.readouterr().out == ''


@pytest.fixture
def trained(tmp_path):
    """Checkpoints of a random network in both forms, an input and its features."""
    pytest.importorskip('mmpretrain')
    model = randomise(mmrep.get_model(TINY)).eval()
    x = image(2, 3, 32, 32, dtype=torch.float32)
    with torch.no_grad():
        expected = model.backbone(x)[0]
    paths = {form: tmp_path / f'{form}.pth' for form in ('train', 'deploy')}
    write_checkpoint(paths['train'], model.state_dict(), {})
    write_checkpoint(paths['deploy'], switched(model).state_dict(), {})
    return paths, x, expected


def switched(model: nn.Module) -> nn.Module:
    switch_to_deploy(model)
    return model


@pytest.mark.parametrize('backbone_only', [False, True])
@pytest.mark.parametrize('deploy', [False, True])
@pytest.mark.parametrize('form', ['train', 'deploy'])
def test_checkpoints(trained, form, deploy, backbone_only):
    paths, x, expected = trained
    model = mmrep.get_model(TINY, paths[form], deploy, backbone_only)
    backbone = model if backbone_only else model.backbone
    assert type(backbone) is RepVGG and not model.training
    fused = {block.deploy for block in reparam_blocks(model).values()}
    assert fused == {form == 'deploy' or deploy}
    with torch.no_grad():
        assert_same(expected, backbone(x)[0], 1e-5)


def test_weights_of_a_backbone_alone(trained, tmp_path):
    paths, x, expected = trained
    backbone = mmrep.get_model(TINY, paths['train'], backbone_only=True)
    write_checkpoint(tmp_path / 'own.pth', backbone.state_dict(), {})
    other = mmrep.get_model(TINY, tmp_path / 'own.pth', backbone_only=True)
    with torch.no_grad():
        assert_same(expected, other(x)[0], 1e-6)


def test_another_checkpoint_is_refused(trained):
    with pytest.raises(CheckpointError):
        mmrep.get_model('repvgg-a0', trained[0]['train'])


def test_without_a_host():
    code = (
        'import sys; sys.modules.update(mmpretrain=None, mmseg=None, mmdet=None);'
        'import mmrep, torch;'
        'model = mmrep.get_model("repvgg-a0", deploy=True, backbone_only=True);'
        'print(tuple(model(torch.rand(1, 3, 64, 64))[-1].shape));'
        'mmrep.get_model("repvgg-a0")'
    )
    ran = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert ran.stdout == '(1, 1280, 2, 2)\n'
    assert 'this config needs mmpretrain, which is not installed' in ran.stderr


def test_what_mmrep_has_not():
    with pytest.raises(AttributeError, match="'mmrep' has no attribute 'get_modl'"):
        mmrep.get_modl  # noqa: B018
