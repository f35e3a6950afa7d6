import csv
import os

import pytest
import torch
from laws import randomise
from mmengine.config import Config
from PIL import Image
from tiny_projects import DBB_RESNET, REPVGG, classifier_model
from tool_runs import succeed, tool

from mmrep.analysis import analyze_branches
from mmrep.deployment import build_model, read_config

pytest.importorskip('mmpretrain')

FILES = ['branches.csv', 'kernels.png', 'shares.png']


@pytest.fixture
def project(tmp_path):
    """Config and checkpoint of a DBB-ResNet; returns where to write."""
    model = classifier_model(DBB_RESNET, 32)
    Config(dict(default_scope='mmpretrain', model=model)).dump(tmp_path / 'net.py')
    model = randomise(build_model(read_config(tmp_path / 'net.py')))
    torch.save(model.state_dict(), tmp_path / 'net.pth')
    return tmp_path


def test_files_and_table(project):
    printed = succeed(
        tool('analyze_branches', 'net.py', 'net.pth', '--out', 'out', cwd=project)
    )
    assert sorted(os.listdir(project / 'out')) == FILES
    with open(project / 'out/branches.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    model = build_model(read_config(project / 'net.py'))
    model.load_state_dict(torch.load(project / 'net.pth', weights_only=True))
    reports = analyze_branches(model)
    assert [(row['block'], row['branch']) for row in rows] == [
        (report.name, branch) for report in reports for branch in report.shares
    ]
    assert float(rows[0]['share']) == pytest.approx(
        reports[0].shares['branch_kxk'], rel=1e-4
    )
    assert 'backbone.layer1.0.conv1' in printed and '1x1_kxk' in printed
    assert f'{reports[0].shares["branch_avg"]:.1%}' in printed
    for name in FILES[1:]:
        with Image.open(project / 'out' / name) as picture:
            assert picture.format == 'PNG'
    before = (project / 'out/shares.png').read_bytes()
    done = tool('analyze_branches', 'net.py', 'net.pth', '--out', 'out', cwd=project)
    assert done.returncode == 1 and 'exists: give another name' in done.stderr
    options = ('--out', 'out', '--overwrite')
    succeed(tool('analyze_branches', 'net.py', 'net.pth', *options, cwd=project))
    assert (project / 'out/shares.png').read_bytes() == before


def test_kernels_that_depend_on_the_size(project, call, capsys):
    conv_cfg = dict(type='Conv2dAdaptivePadding')
    model = classifier_model(dict(REPVGG, conv_cfg=conv_cfg))
    config = project / 'same.py'
    Config(dict(default_scope='mmpretrain', model=model)).dump(config)
    torch.save(build_model(read_config(config)).state_dict(), project / 'same.pth')
    out = ('--out', project / 'out', '--shape', 32)
    call('analyze_branches', config, project / 'same.pth', *out)
    assert 'backbone.stem' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('backbone', 'says'),
    [
        (dict(DBB_RESNET, deploy=True), 'no block in train form'),
        (dict(DBB_RESNET, type='mmrep.ReparamResNet', block_cfg=None), 'no block in train'),
    ],
)
def test_without_blocks(project, refused, backbone, says):
    config = project / 'plain.py'
    model = classifier_model(backbone, 32)
    Config(dict(default_scope='mmpretrain', model=model)).dump(config)
    torch.save(build_model(read_config(config)).state_dict(), project / 'plain.pth')
    out = ('--out', project / 'out')
    refused('analyze_branches', config, project / 'plain.pth', *out, says=says)
    assert not (project / 'out').exists()
