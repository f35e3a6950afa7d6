import json
import math

import pytest
from mmengine.config import Config
from PIL import Image
from tiny_projects import DBB_RESNET, classifier_model
from tool_runs import assert_one_sentence, succeed, tool

QUICK = ['--rounds', '1', '--batch-size', '2', '--shape', '3,16,16', '--no-compile']


@pytest.fixture
def config(tmp_path):
    path = tmp_path / 'tiny.py'
    model = classifier_model(DBB_RESNET, 32)
    Config(dict(default_scope='mmpretrain', model=model)).dump(path)
    return path


def write_metafile(folder, **metrics) -> None:
    model = dict(Config='configs/tiny.py', Results=[dict(Metrics=metrics)])
    (folder / 'metafile.yml').write_text(json.dumps(dict(Models=[model])))


def test_figures_table_and_plane(config, tmp_path):
    write_metafile(tmp_path, **{'Published Top 1 Accuracy': 70.5})
    out, plane = tmp_path / 'new' / 'figures.json', tmp_path / 'plane.png'
    tasks = ['--tasks', 'train', 'eval']
    printed = succeed(
        tool(
            *('benchmark', '~/tiny.py', *QUICK, *tasks),
            *('--out=~/new/figures.json', '--plane=~/plane.png'),
            HOME=str(tmp_path),
        )
    )
    (result,) = json.loads(out.read_text())
    assert result['config'] == 'tiny'
    assert result['shape'] == [2, 3, 16, 16]
    timings = {(t['task'], t['name']): t for t in result['timings']}
    assert timings.keys() == {
        ('train', 'mmrep'),
        ('train', 'plain'),
        ('eval', 'mmrep'),
        ('eval', 'plain'),
        ('eval', 'mmrep, deploy form'),
    }
    assert all(math.isfinite(t['median']) and t['median'] > 0 for t in timings.values())
    for text in ('training step', 'evaluation', 'plain', '2x3x16x16', 'parameters'):
        assert text in printed
    for size in result['sizes'].values():
        assert f'{size["parameters"]:,}' in printed
    with Image.open(plane) as picture:
        assert picture.format == 'PNG'


WRONG = {
    'no such config': (['missing.py'], 'missing.py'),
    'no GPU': (['CONFIG', '--device', 'cuda'], '--device cuda needs a GPU'),
    'plane without eval': (
        ['CONFIG', '--plane', 'plane.png', '--tasks', 'train'],
        '--plane needs eval',
    ),
}


@pytest.mark.parametrize('name', WRONG)
def test_refusals(config, tmp_path, name):
    arguments, says = WRONG[name]
    arguments = [config if argument == 'CONFIG' else argument for argument in arguments]
    result = tool('benchmark', *arguments, cwd=tmp_path, CUDA_VISIBLE_DEVICES='')
    assert result.returncode == 1
    assert_one_sentence(result.stderr, says)
    assert result.stdout == ''
    assert [path.name for path in tmp_path.iterdir()] == ['tiny.py']
