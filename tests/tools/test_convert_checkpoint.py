"""The converter as a user runs it."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmrep.importers import Imported

timm = pytest.importorskip('timm')

TOOL = Path(__file__).parents[2] / 'tools/convert_checkpoint.py'


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    """A checkpoint of timm's."""
    path = tmp_path_factory.mktemp('source') / 'a0.pth'
    torch.save(timm.create_model('repvgg_a0', num_classes=5).state_dict(), path)
    return path


@pytest.fixture
def run_here(monkeypatch):
    """Run the tool in this process: to start another one takes seconds."""

    def run(*arguments):
        monkeypatch.setattr(sys, 'argv', [str(TOOL), *map(str, arguments)])
        runpy.run_path(str(TOOL), run_name='__main__')

    return run


def run(*arguments):
    return subprocess.run(
        [sys.executable, TOOL, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_convert_and_refuse_to_replace(source, tmp_path):
    out = tmp_path / 'made' / 'a0.pth'
    process = run(source, out)
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith(f'# {out}: 351 weights of timm\n')
    names = {}
    exec(process.stdout, names)  # ready to paste
    meta = torch.load(out, weights_only=True)['meta']
    assert names['backbone'] == meta['backbone']
    assert names['backbone'] == dict(type='mmrep.RepVGG', arch='A0', out_indices=(3,))
    assert names['head'] == meta['head'] and names['head']['num_classes'] == 5

    before = out.read_bytes()
    process = run(source, out)
    assert process.returncode == 1 and not process.stdout
    assert process.stderr.splitlines()[-1] == (
        f'error: {out} exists: give another name, or --overwrite'
    )
    assert 'Traceback' not in process.stderr
    assert out.read_bytes() == before


def test_options(source, tmp_path, run_here, capsys):
    out = tmp_path / 'out.pth'
    out.write_text('old')
    run_here(source, out, '--from', 'timm', '--arch', 'A0', '--overwrite')
    assert torch.load(out, weights_only=True)['meta']['backbone']['arch'] == 'A0'
    assert '351 weights of timm' in capsys.readouterr().out


def test_all_but_the_configs_is_in_comments(capsys):
    backbone = dict(type='mmrep.RepVGG', arch=dict(group_layer_map={2: 4}))
    left_out = {'state of the optimizer': 3}
    done = Imported('keras', backbone, None, 7, left_out, 'take care', Path('a.pth'))
    runpy.run_path(str(TOOL))['show'](done)
    printed = capsys.readouterr().out
    assert '# left out: 3 keys, state of the optimizer\n# note: take care\n' in printed
    exec(printed, names := {})
    assert names['backbone'] == backbone and 'head' not in names


@pytest.mark.parametrize(
    ('options', 'sentence'),
    [
        (('--arch', 'B0'), 'leave --arch B0 out'),
        (('--from', 'dbb'), 'another layout with --from'),
    ],
)
def test_refusals(options, sentence, source, tmp_path, run_here):
    out = tmp_path / 'out.pth'
    with pytest.raises(SystemExit, match=f'^error: .*{sentence}'):
        run_here(source, out, *options)
    assert not out.exists()


def test_a_file_that_is_not_there(tmp_path, run_here):
    with pytest.raises(SystemExit, match='does not exist: check the path'):
        run_here(tmp_path / 'none.pth', tmp_path / 'out.pth')


def test_a_layout_that_is_no_choice(source, tmp_path, run_here, capsys):
    with pytest.raises(SystemExit, match='2'):
        run_here(source, tmp_path / 'out.pth', '--from', 'jax')
    assert 'repvggplus' in capsys.readouterr().err
