"""From a trained plain network to an expanded one, and back to the host's own."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from mmengine.config import Config
from processes import run_python
from tiny_projects import classifier_model, write_classification
from tool_runs import Project, scores, succeed, tool, variant

mmpretrain = pytest.importorskip('mmpretrain')

RESNET = dict(type='ResNet', depth=18, base_channels=4, stem_channels=4)
#: Runs a tool of the host's own where mmrep cannot be imported.
WITHOUT_MMREP = """
import runpy, sys
sys.modules['mmrep'] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
assert not [name for name in sys.modules if name.startswith('mmrep.')]
"""


class Flow(NamedTuple):
    """What the tools made, one after the other."""

    plain: Project
    expanded: Path
    trained: Path
    deployed: Path
    printed: str


def train(config: Path, root: Path) -> Path:
    """The checkpoint of an epoch."""
    work_dir = root / config.stem
    succeed(tool('train', config, '--work-dir', work_dir, cwd=root))
    return work_dir / 'epoch_1.pth'


@pytest.fixture(scope='module')
def flow(tmp_path_factory) -> Flow:
    root = tmp_path_factory.mktemp('expanded')
    whole = Config.fromfile(write_classification(root))
    # For all of it, as _delete_ says.
    whole.model = classifier_model(RESNET, 32)
    config = root / 'plain.py'
    whole.dump(config)
    checkpoint = train(config, root)
    plain = Project(root, config, root / 'plain', checkpoint, '')
    options = ('--checkpoint', checkpoint, '--out', 'new.py')
    printed = succeed(tool('expand', config.name, *options, cwd=root))
    expanded = root / 'new.py'
    trained = train(variant(expanded, root, load_from=str(checkpoint)), root)
    succeed(tool('reparam', expanded.name, trained, 'out.pth', cwd=root))
    return Flow(plain, expanded, trained, root / 'out.py', printed)


def predicted(config: Path, checkpoint: Path, folder: Path) -> torch.Tensor:
    """What mmrep's tool predicts with weights."""
    options = ('--work-dir', folder / 'work', '--out', folder / 'a.pkl')
    succeed(tool('test', config, checkpoint, *options, '--out-item', 'pred'))
    return scores(folder / 'a.pkl')


def test_what_is_printed(flow):
    lines = [' '.join(line.split()) for line in flow.printed.splitlines()]
    assert 'convs: 16 replaced, 4 left' in lines
    assert 'left: backbone.conv1: 7x7' in lines
    assert 'left: backbone.layer2.0.downsample.0 and 2 more: 1x1' in lines
    assert 'written: new.py' in lines and 'new.pth' in lines
    assert '│ backbone.layer1.0.conv1 │ backbone.layer1.0.bn1 │' in lines


@pytest.mark.long
def test_same_scores_before_training(flow, tmp_path):
    expected = predicted(flow.plain.config, flow.plain.checkpoint, tmp_path)
    assert expected.std() > 0
    own = flow.expanded.with_suffix('.pth')
    for weights in (own, flow.plain.checkpoint):
        found = predicted(flow.expanded, weights, tmp_path)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_by_the_host_s_own_tool(flow, tmp_path):
    """Trained on, it is another function, and the host's is the same."""
    expected = predicted(flow.expanded, flow.trained, tmp_path)
    plain = predicted(flow.plain.config, flow.plain.checkpoint, tmp_path)
    assert (expected - plain).abs().max() > 1e-3
    assert 'mmrep' not in flow.deployed.read_text()
    test = Path(mmpretrain.__file__).parent / '.mim/tools/test.py'
    out = tmp_path / 'b.pkl'
    weights = flow.deployed.with_suffix('.pth')
    options = ('--work-dir', tmp_path, '--out', out, '--out-item', 'pred')
    command = ('-c', WITHOUT_MMREP, test, flow.deployed, weights, *options)
    succeed(run_python(*command))
    torch.testing.assert_close(scores(out), expected, rtol=1e-4, atol=1e-5)


def test_a_dry_run_writes_nothing(flow, tmp_path, call, capsys):
    call(
        'expand',
        flow.plain.config,
        '--dry-run',
        '--include',
        're:.*layer1.*',
        '--shape',
        32,
    )
    assert 'written:      nothing' in capsys.readouterr().out


@pytest.mark.parametrize(
    'options, says',
    [
        (['--dry-run', '--block', 'Foo'], "'Foo' is not a re-parameterizable block"),
        (['--dry-run', '--include', 'no*'], "'no*' matches no conv"),
        (['--dry-run', '--shape', '1,8,8'], 'give a fitting --shape'),
        (['--out', 'a.txt'], 'must end in .py'),
    ],
)
def test_wrong_input(flow, tmp_path, monkeypatch, refused, options, says):
    monkeypatch.chdir(tmp_path)
    refused('expand', flow.plain.config, *options, says=says)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    'options, says',
    [
        ([], 'give either --out, the config to write, or --dry-run'),
        (['--out', 'a.py', '--dry-run'], 'give either --out'),
        (['--out', 'a.py', '--cfg-options', 'a=1'], 'would not be in OUT'),
        (['--dry-run', '--kernel-sizes', '0'], 'is not a whole number from 1'),
    ],
)
def test_wrong_command_line(flow, call, capsys, options, says):
    with pytest.raises(SystemExit) as info:
        call('expand', flow.plain.config, *options)
    assert info.value.code == 2 and says in capsys.readouterr().err
