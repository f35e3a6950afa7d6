"""Projects that the tools have worked on."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from tiny_projects import write_classification, write_segmentation
from tool_runs import (
    Project,
    arguments,
    assert_one_sentence,
    load,
    reparam,
    scores,
    succeed,
    tool,
)

from mmrep.cli import run_tool


@pytest.fixture
def refused(call: Callable, capsys: pytest.CaptureFixture) -> Callable:
    """Call a tool, which must end with one sentence that says all the parts."""

    def refused(name: str, *arguments: Any, says: tuple[str, ...] | str) -> None:
        with pytest.raises(SystemExit) as info:
            call(name, *arguments)
        message = info.value.code
        assert isinstance(message, str), f'{message}: {capsys.readouterr().err}'
        assert '\n' not in message
        assert_one_sentence(message, *([says] if isinstance(says, str) else says))

    return refused


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Call a tool in this process: for the many ways to use it."""

    def call(name: str, *arguments: Any) -> None:
        monkeypatch.setattr(sys, 'argv', [f'{name}.py', *map(str, arguments)])
        run_tool(load(name).main)

    return call


@pytest.fixture
def predict(call: Callable, tmp_path: Path) -> Callable:
    """Test a project; returns what it predicts."""

    def predict(project: Project, *options: Any, **entries: Any) -> torch.Tensor:
        out = tmp_path / 'scores.pkl'
        options += ('--out', out, '--out-item', 'pred')
        call('test', *arguments(project, tmp_path, *options, **entries))
        return scores(out)

    return predict


@pytest.fixture(scope='session')
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Trained with averaged weights, into the folder that the tool chooses."""
    root = tmp_path_factory.mktemp('classifier')
    config = write_classification(root)
    cfg = Config.fromfile(config)
    cfg.custom_hooks = [dict(type='EMAHook', momentum=0.5)]
    cfg.dump(config)
    log = succeed(tool('train', config.name, cwd=root))
    work_dir = root / 'work_dirs' / 'tiny_classifier'
    return Project(root, config, work_dir, work_dir / 'epoch_1.pth', log)


@pytest.fixture(scope='session')
def segmentor(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Trained into a folder that the user chose."""
    root = tmp_path_factory.mktemp('segmentor')
    config = write_segmentation(root)
    work_dir = root / 'here'
    log = succeed(tool('train', config, '--work-dir', work_dir, cwd=root))
    return Project(root, config, work_dir, work_dir / 'iter_2.pth', log)


@pytest.fixture(scope='session')
def deployed_classifier(classifier: Project) -> Project:
    """What tools/reparam.py made of it."""
    return reparam(classifier)


@pytest.fixture(scope='session')
def deployed_segmentor(segmentor: Project) -> Project:
    """What tools/reparam.py made of it."""
    return reparam(segmentor)


@pytest.fixture(params=['classifier', 'segmentor'])
def pair(request: pytest.FixtureRequest) -> tuple[Project, Project]:
    """A trained project and its deploy form, for both tasks."""
    names = request.param, f'deployed_{request.param}'
    return tuple(request.getfixturevalue(name) for name in names)
