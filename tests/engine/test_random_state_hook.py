"""Random numbers before and after a run is resumed."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from tiny_runner import MeanLogits, tiny_runner
from torch.utils.data import Dataset

from mmrep.checkpoints import read_checkpoint
from mmrep.engine.random_state_hook import random_state, set_random_state
from mmrep.errors import CheckpointError


def draws() -> list[float]:
    """A number of every generator, and the first of a pair of which two keep the second."""
    return [random.gauss(0, 1), np.random.randn(), torch.rand(()).item()]


def test_a_state_is_set():
    draws()
    state = random_state()
    first = draws()
    assert draws() != first
    set_random_state(state)
    assert draws() == first


def test_those_of_many_processes_are_read(tmp_path):
    states = [random_state() for _ in range(512)]
    first = draws()
    torch.save(dict(state_dict={}, random_state=states), tmp_path / 'a.pth')
    set_random_state(read_checkpoint(tmp_path / 'a.pth')['random_state'][511])
    assert draws() == first


def changed(name: str, place: int, value: Any) -> list[dict]:
    """The states of one process with another part of one of them."""
    state = random_state()
    parts = list(state[name])
    parts[place] = value
    return [{**state, name: tuple(parts)}]


@pytest.mark.parametrize(
    'states',
    [
        *('x', [3], [{}], [dict(python=1)]),
        *(changed('python', 1, value) for value in (None, torch.ones(3), torch.ones(625))),
        *(changed('numpy', 1, value) for value in ([], torch.ones(3), -torch.ones(624))),
        *(changed('numpy', 2, value) for value in (-1, 625, 10**9, 'x')),
        changed('numpy', 0, 'PCG64'),
        [{**random_state(), 'torch': torch.zeros(3)}],
    ],
)
def test_broken_states(trained, tmp_path, states):
    content = torch.load(trained, weights_only=True)
    content['random_state'] = states
    torch.save(content, tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match='its random_state is broken'):
        resume(tmp_path / 'a.pth', tmp_path / 'resumed')


class Noise(Dataset):
    """Images that are drawn when they are read, of all generators."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict:
        return dict(inputs=torch.rand(3, 6, 6) + sum(draws()), labels=index % 2)


class DrawHook(Hook):
    """Keeps what every iteration sees and draws; validations draw as well."""

    def __init__(self) -> None:
        self.seen = {}

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        self.seen[runner.iter] = [*draws(), data_batch['inputs'].sum().item()]

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        draws()


def loader(num_workers: int = 0, **options: Any) -> dict:
    return dict(
        batch_size=2,
        num_workers=num_workers,
        dataset=Noise(),
        sampler=dict(type='DefaultSampler', shuffle=True),
        collate_fn=dict(type='default_collate'),
        **options,
    )


HOOKS = [dict(type=f'mmrep.{name}') for name in ('RandomStateHook', 'PlainCheckpointHook')]
BY_ITERATION = dict(
    train_cfg=dict(type='IterBasedTrainLoop', max_iters=6),
    default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=3)),
)


def run(folder: Path, *hooks: Any, **options: Any) -> dict[int, list]:
    """Train for three epochs of two iterations; returns what each of them saw."""
    draw = DrawHook()
    entries = dict(
        randomness=dict(seed=7),
        custom_hooks=[draw, *HOOKS, *hooks],
        train_dataloader=loader(),
        train_cfg=dict(by_epoch=True, max_epochs=3),
    )
    tiny_runner(folder, **{**entries, **options}).train()
    return draw.seen


def log_of(folder: Path) -> str:
    return ''.join(path.read_text() for path in folder.glob('*/*.log'))


def resume(path: Path, folder: Path, **options: Any) -> dict[int, list]:
    draws()
    return run(folder, load_from=str(path), resume=True, **options)


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> Path:
    """A checkpoint of the second epoch."""
    folder = tmp_path_factory.mktemp('trained')
    run(folder)
    return folder / 'epoch_2.pth'


def test_epochs(tmp_path):
    whole = run(tmp_path)
    rest = resume(tmp_path / 'epoch_2.pth', tmp_path / 'resumed')
    assert rest == {iteration: whole[iteration] for iteration in (4, 5)}


@pytest.fixture
def no_sleep(monkeypatch):
    """mmengine waits before it starts a round of the data, and torch for its workers."""
    monkeypatch.setattr('mmengine.runner.loops.time.sleep', lambda seconds: None)
    monkeypatch.setattr('torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL', 0.1)


def test_iterations(tmp_path, no_sleep):
    """From the midst of a round of the data."""
    whole = run(tmp_path, **BY_ITERATION)
    rest = resume(tmp_path / 'iter_3.pth', tmp_path / 'resumed', **BY_ITERATION)
    assert rest == {iteration: whole[iteration] for iteration in (3, 4, 5)}


@pytest.mark.parametrize(
    ('name', 'persistent', 'options'),
    [('epoch_2', False, {}), ('iter_3', True, BY_ITERATION)],
)
def test_workers(tmp_path, no_sleep, name, persistent, options):
    options = dict(options, train_dataloader=loader(1, persistent_workers=persistent))
    whole = run(tmp_path, **options)
    rest = resume(tmp_path / f'{name}.pth', tmp_path / 'resumed', **options)
    assert rest
    assert rest == {iteration: whole[iteration] for iteration in rest}
    assert 'draws other random numbers' not in log_of(tmp_path / 'resumed')


def test_workers_that_persist_over_epochs(tmp_path, no_sleep):
    options = dict(train_dataloader=loader(1, persistent_workers=True))
    run(tmp_path, **options)
    resume(tmp_path / 'epoch_2.pth', tmp_path / 'resumed', **options)
    log = log_of(tmp_path / 'resumed')
    assert 'draws other random numbers than an uninterrupted one' in log
    assert 'persistent_workers start anew' in log


def test_validation_changes_nothing(tmp_path, no_sleep):
    validation = dict(
        val_dataloader=dict(loader(), dataset=Noise()),
        val_cfg=dict(),
        val_evaluator=[MeanLogits()],
    )
    without = run(tmp_path / 'without')
    assert run(tmp_path / 'with', **validation) == without


class SaveHook(Hook):
    """Saves in the midst of an epoch, which CheckpointHook does not."""

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        if runner.iter == 2:
            runner.save_checkpoint(runner.work_dir, 'mine.pth')
            self.drawn = draws()


def test_any_moment(tmp_path):
    hook = SaveHook()
    run(tmp_path, hook)
    (state,) = torch.load(tmp_path / 'mine.pth', weights_only=False)['random_state']
    set_random_state(state)
    assert draws() == hook.drawn


@pytest.mark.parametrize(
    ('states', 'says'),
    [(None, 'holds no random_state'), ([{}, {}], 'was written by 2 processes')],
)
def test_what_cannot_be_restored_is_said(tmp_path, states, says):
    run(tmp_path)
    content = torch.load(tmp_path / 'epoch_2.pth', weights_only=False)
    content['random_state'] = states
    torch.save(content, tmp_path / 'a.pth')
    assert resume(tmp_path / 'a.pth', tmp_path / 'resumed').keys() == {4, 5}
    assert f'uninterrupted one: the checkpoint {says}' in log_of(tmp_path / 'resumed')


def test_fine_tuning_starts_anew(tmp_path):
    whole = run(tmp_path)
    tuned = run(tmp_path / 'tuned', load_from=str(tmp_path / 'epoch_2.pth'))
    assert [seen[:3] for seen in tuned.values()] == [seen[:3] for seen in whole.values()]
