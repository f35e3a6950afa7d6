"""What the tools do with names of files that are strange, or that cannot be written."""

import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from tiny_projects import REPVGG
from tool_runs import load

from mmrep.benchmark import Benchmark
from mmrep.checkpoints import sha256_of
from mmrep.registry import MODELS

#: The tools that write, with the suffix that their result has.
SUFFIXES = {
    'reparam': '.pth',
    'convert_checkpoint': '.pth',
    'export_onnx': '.onnx',
    'quantize_onnx': '.onnx',
}

#: What is written besides.
BESIDES = {'reparam': ['.py'], 'quantize_onnx': ['.json', '.png']}

#: A network that has hardly been trained may lose much.
OPTIONS = {
    'quantize_onnx': ['--samples=2', '--allow-drop', '--method=minmax', '--per-channel=yes']
}

#: Would be code, markup, an emoji and a terminal's command.
STRANGE = 'a\nimport os\n[red]:smile:é\'"{{ fileBasename }}\x1b[2J'

#: How it is printed, on one line.
PRINTED = r"a\nimport os\n[red]:smile:é'" + '"' + r'{{ fileBasename }}\x1b[2J'


@pytest.fixture(scope='session')
def foreign(tmp_path_factory) -> Path:
    """A checkpoint of the official RepVGG's layout, in deploy form."""
    backbone = MODELS.build(dict(REPVGG, type='mmrep.RepVGG', deploy=True))
    weights = {
        key.replace('stage_', 'stage')
        .replace('stem', 'stage0')
        .replace('branch_reparam', 'rbr_reparam'): value
        for key, value in backbone.state_dict().items()
        if not key.endswith('reparam_start')
    }
    path = tmp_path_factory.mktemp('foreign') / 'foreign.pth'
    torch.save(weights, path)
    return path


@pytest.fixture
def sources(classifier, foreign) -> Callable[[str], list]:
    """What a tool reads, by its name."""
    pytest.importorskip('onnxruntime')
    project = [classifier.config, classifier.checkpoint]
    return lambda tool: [foreign] if tool == 'convert_checkpoint' else project


@pytest.fixture
def call(call) -> Callable:
    """Call a tool with its options."""
    return lambda tool, *arguments: call(tool, *OPTIONS.get(tool, ()), *arguments)


@pytest.mark.parametrize('tool', SUFFIXES)
def test_strange_name(sources, tool, tmp_path, call, capsys):
    copies = []
    for source in sources(tool):
        copies.append(tmp_path / f'{STRANGE}-source{source.suffix}')
        shutil.copy(source, copies[-1])
    out = tmp_path / f'{STRANGE}{SUFFIXES[tool]}'
    before = set(os.listdir(tmp_path))
    call(tool, *copies, out)
    printed = capsys.readouterr().out
    assert f'{tmp_path / PRINTED}{out.suffix}' in printed
    made = {out.with_suffix(suffix).name for suffix in (out.suffix, *BESIDES.get(tool, ()))}
    assert set(os.listdir(tmp_path)) - before == made
    if tool == 'convert_checkpoint':
        exec(printed, names := {})
        assert names.keys() - {'__builtins__'} == {'backbone'}
    if tool == 'reparam':
        config = out.with_suffix('.py')
        title = r'# The deploy form of a\nimport os\n[red]:smile:'
        assert config.read_text().startswith(title)
        assert Config.fromfile(config).fused_checkpoint.file == out.name
        call('test', config, out, '--work-dir', tmp_path / 'work')


def test_name_of_a_config_that_is_timed(capsys):
    load('benchmark').show(Benchmark(STRANGE, 'cpu', 'float32', (1, 3, 8, 8)))
    assert f'\n{PRINTED} (cpu, float32, 1x3x8x8)\n' in capsys.readouterr().out


@pytest.mark.parametrize('tool', SUFFIXES)
def test_name_that_is_no_text(sources, tool, tmp_path, call, capsys):
    """As it comes from a disk with names in another encoding than UTF-8."""
    out = tmp_path / f'a\udcff{SUFFIXES[tool]}'
    call(tool, *sources(tool), out)
    assert rf'{tmp_path}/a\udcff' in capsys.readouterr().out
    assert out.name in os.listdir(tmp_path)


def test_pair_of_a_name_that_is_no_text(classifier, tmp_path, call):
    source, out = tmp_path / 'a\udcff.pth', tmp_path / 'b\udcff.pth'
    shutil.copy(classifier.checkpoint, source)
    call('reparam', classifier.config, source, out)
    call('test', out.with_suffix('.py'), out, '--work-dir', tmp_path / 'work')


#: Names, relative to an empty folder, and what is said of them.
BAD_NAMES = [
    ('a{suffix}/', 'is the name of a folder: give the name of a file'),
    ('folder{suffix}', 'is a folder: give the name of a file'),
    ('pipe{suffix}', 'is a device or a pipe: give the name of a file'),
    ('file/a{suffix}', 'cannot be written ('),
    ('{long}{suffix}', 'cannot be written (File name too long)'),
    ('a\n{long}{suffix}', 'cannot be written (File name too long)'),
    ('old{suffix}', 'exists: give another name, or --overwrite'),
    ('link{suffix}', 'exists: give another name, or --overwrite'),
    ('/proc/a{suffix}', '/proc/a{suffix} cannot be written ('),
]


@pytest.mark.parametrize(('name', 'says'), BAD_NAMES, ids=[repr(n) for n, _ in BAD_NAMES])
@pytest.mark.parametrize('tool', SUFFIXES)
def test_bad_name(sources, tool, tmp_path, monkeypatch, refused, tally, name, says):
    monkeypatch.chdir(tmp_path)
    words = dict(suffix=SUFFIXES[tool], long='ä' * 126)
    for old in ('file', f'old{SUFFIXES[tool]}'):
        (tmp_path / old).write_text('precious')
    (tmp_path / f'folder{SUFFIXES[tool]}').mkdir()
    os.mkfifo(tmp_path / f'pipe{SUFFIXES[tool]}')
    (tmp_path / f'link{SUFFIXES[tool]}').symlink_to('file')
    before = sorted(os.listdir(tmp_path))
    options = [] if 'exists' in says else ['--overwrite']
    refused(tool, *sources(tool), name.format(**words), *options, says=says.format(**words))
    assert sorted(os.listdir(tmp_path)) == before
    for old in ('file', f'old{SUFFIXES[tool]}'):
        assert (tmp_path / old).read_text() == 'precious'
    tally('bad inputs')


@pytest.mark.parametrize('tool', SUFFIXES)
def test_limit_of_the_file_size(sources, tool, tmp_path, refused, tally):
    out = tmp_path / f'new/out{SUFFIXES[tool]}'
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, hard))
    try:
        refused(tool, *sources(tool), out, says='cannot be written (File too large)')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not os.listdir(tmp_path)
    tally('bad inputs')


def test_links(classifier, tmp_path, call):
    """Each stays; the pair is of the names that the user gave."""
    for suffix in ('.pth', '.py'):
        (tmp_path / f'out{suffix}').symlink_to(f'disk/content{suffix}')
    out = tmp_path / 'out.pth'
    call('reparam', classifier.config, classifier.checkpoint, out)
    assert out.is_symlink() and out.with_suffix('.py').is_symlink()
    assert sorted(os.listdir(tmp_path / 'disk')) == ['content.pth', 'content.py']
    pair = Config.fromfile(out.with_suffix('.py')).fused_checkpoint
    assert pair == dict(file='out.pth', sha256=sha256_of(out))


class TestPair:
    """The deploy config of one checkpoint is refused with another."""

    @pytest.fixture
    def mixed(self, classifier, deployed_classifier, tmp_path, call) -> list[Path]:
        """The config of one run, and the checkpoint of another."""
        call(
            *('reparam', classifier.config, classifier.checkpoint, tmp_path / 'other.pth'),
            *('--seed', 1),
        )
        return [deployed_classifier.config, tmp_path / 'other.pth']

    @pytest.fixture
    def again(self, mixed, tmp_path) -> list[Any]:
        return [*mixed, '--work-dir', tmp_path / 'work']

    def test_test(self, mixed, again, tmp_path, call, refused):
        config, checkpoint = mixed
        says = f'{config} was not written together with {checkpoint}: fuse again'
        refused('test', *again, says=says)
        call('test', *again, '--cfg-options', 'fused_checkpoint=None')

    def test_export(self, mixed, tmp_path, call, refused):
        pytest.importorskip('onnxruntime')
        out = tmp_path / 'a.onnx'
        refused('export_onnx', *mixed, out, says=f'not written together with {mixed[1]}')
        call('export_onnx', tmp_path / 'other.py', mixed[1], out)
        assert out.exists()
