"""Tools as a user runs them, and what they leave behind."""

import importlib.util
import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from subprocess import CompletedProcess
from types import ModuleType
from typing import Any

import mmengine
import torch
from mmengine.config import Config
from processes import run_python

TOOLS = Path(__file__).parents[2] / 'tools'
_names = itertools.count()


@dataclass(frozen=True)
class Project:
    """A config and its checkpoint.

    Args:
        root: Where its files are.
        config: The config.
        work_dir: Where training wrote.
        checkpoint: The checkpoint.
        log: What the tool printed.
    """

    root: Path
    config: Path
    work_dir: Path
    checkpoint: Path
    log: str


def tool(name: str, *arguments: Any, **options: Any) -> CompletedProcess:
    """Run one of the tools as a user does."""
    return run_python(TOOLS / f'{name}.py', *arguments, **options)


def succeed(done: CompletedProcess) -> str:
    """What a command printed, if it ended well."""
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def assert_one_sentence(error: str, *parts: str) -> None:
    """A tool ended with one sentence that says all the parts, and no traceback."""
    assert 'Traceback' not in error
    (line,) = [line for line in error.splitlines() if line.startswith('error: ')]
    for part in parts:
        assert part in line


def load(name: str) -> ModuleType:
    """A tool as a module."""
    spec = importlib.util.spec_from_file_location(f'tool_{name}', TOOLS / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def variant(config: Path, folder: Path, **entries: Any) -> Path:
    """A config with other entries.

    mmengine keeps loggers and message hubs by the experiment's name: this one has its own.
    """
    name = f'variant_{next(_names)}'
    path = folder / f'{name}.py'
    cfg = Config.fromfile(config)
    cfg.merge_from_dict(dict(experiment_name=name, **entries))
    cfg.dump(path)
    return path


def reparam(project: Project) -> Project:
    """The deploy form of a project."""
    out = project.root / 'deploy.pth'
    arguments = [project.config.name, project.checkpoint, out.name]
    log = succeed(tool('reparam', *arguments, cwd=project.root))
    return replace(project, config=out.with_suffix('.py'), checkpoint=out, log=log)


def arguments(project: Project, folder: Path, *options: Any, **entries: Any) -> list:
    """Config, checkpoint and work dir of a test."""
    config = variant(project.config, folder, **entries)
    return [config, project.checkpoint, '--work-dir', folder / 'work', *options]


def scores(path: Path) -> torch.Tensor:
    """What a model predicts of every image and class, from a file of predictions."""
    samples = mmengine.load(path)
    return torch.stack(
        [s['pred_score'] if 'pred_score' in s else s['seg_logits']['data'] for s in samples]
    )
