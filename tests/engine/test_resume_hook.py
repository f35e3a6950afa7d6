"""Checkpoints that must not be resumed, and what is used of those that are."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import Runner
from tiny_runner import tiny_runner

from mmrep.engine import check_training
from mmrep.engine.resume_hook import own_file
from mmrep.errors import CheckpointError

NAMES = ('ResumeHook', 'RandomStateHook', 'PlainCheckpointHook')
OPTIONS = dict(
    param_scheduler=[
        dict(type='MultiStepLR', milestones=[1]),
        dict(type='CosineAnnealingLR', T_max=4),
    ],
    train_cfg=dict(by_epoch=True, max_epochs=2),
    custom_hooks=[*(dict(type=f'mmrep.{name}') for name in NAMES), dict(type='EMAHook')],
)


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory) -> Path:
    """Of the first epoch."""
    folder = tmp_path_factory.mktemp('trained')
    tiny_runner(folder, **OPTIONS).train()
    return folder / 'epoch_1.pth'


def resumed(path: Path, folder: Path, **options: Any) -> Runner:
    runner = tiny_runner(folder, **{**OPTIONS, **options}, load_from=str(path), resume=True)
    runner.train()
    return runner


def without(*keys: Any) -> Callable[[dict], None]:
    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return change


def holding(value: Any, *keys: Any) -> Callable[[dict], None]:
    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


HUB, INFO = 'message_hub', ('message_hub', 'runtime_info')


def logged(name: Any = 'loss', **changes: Any) -> Callable[[dict], None]:
    """Another history; of what is ``None`` there is none."""
    history = dict(log_history=torch.ones(2), count_history=torch.ones(2), max_length=9)
    history = {k: v for k, v in (history | changes).items() if v is not None}
    return holding({name: history}, HUB, 'log_scalars')


#: Changes of the file, and the entry that the sentence names.
BROKEN = {
    'no epoch': (without('meta', 'epoch'), 'holds no meta.epoch'),
    'epoch': (holding('one', 'meta', 'epoch'), 'meta.epoch is broken'),
    'truth': (holding(True, 'meta', 'epoch'), 'meta.epoch'),
    'iteration': (holding(-1, 'meta', 'iter'), 'meta.iter'),
    'seed': (holding('x', 'meta', 'seed'), 'meta.seed'),
    'many epochs': (holding(2**31, 'meta', 'epoch'), 'meta.epoch'),
    'many iterations': (holding(2**31, 'meta', 'iter'), 'meta.iter'),
    'negative seed': (holding(-1, 'meta', 'seed'), 'meta.seed'),
    'long seed': (holding(2**32, 'meta', 'seed'), 'meta.seed'),
    'meta': (holding([], 'meta'), 'meta is broken'),
    'no hub': (without(HUB), 'holds no training to resume'),
    'hub': (holding([], HUB), 'message_hub is broken'),
    'no log': (without(HUB, 'log_scalars'), 'no message_hub.log_scalars'),
    'log': (holding({'loss': 3}, HUB, 'log_scalars'), 'log_scalars'),
    'history': (holding({'loss': dict(max_length=3)}, HUB, 'log_scalars'), 'log_scalars'),
    'history of no name': (logged(5), 'log_scalars'),
    'history and more': (logged(more=1), 'log_scalars'),
    'history without end': (logged(max_length=None), 'log_scalars'),
    'lengths': (logged(count_history=torch.ones(3)), 'log_scalars'),
    'half numbers': (logged(log_history=torch.ones(2).bfloat16()), 'log_scalars'),
    'trained numbers': (
        logged(log_history=torch.ones(2, requires_grad=True)),
        'log_scalars',
    ),
    'keys': (holding(3, HUB, 'resumed_keys'), 'resumed_keys'),
    'best score': (holding('x', *INFO, 'best_score'), 'runtime_info'),
    'best scores': (holding(torch.ones(2), *INFO, 'best_score_a'), 'runtime_info'),
    'best path': (holding(3, *INFO, 'best_ckpt'), 'runtime_info'),
    'kept': (holding(['../x'], *INFO, 'keep_ckpt_ids'), 'runtime_info'),
    'no optimizer': (without('optimizer'), 'holds no optimizer'),
    'optimizer': (holding(3, 'optimizer'), 'optimizer is broken'),
    'average of others': (
        holding(torch.ones(2), 'ema_state_dict', 'module.fc.other'),
        'ema_state_dict',
    ),
    'average of another shape': (
        holding(torch.ones(3), 'ema_state_dict', 'module.fc.bias'),
        'ema_state_dict',
    ),
    'average': (holding({'module.fc.bias': 3}, 'ema_state_dict'), 'ema_state_dict'),
}


@pytest.mark.parametrize('name', BROKEN)
def test_broken(checkpoint, name):
    content = torch.load(checkpoint, weights_only=True)
    check_training(content, 'a.pth')
    change, says = BROKEN[name]
    change(content)
    with pytest.raises(CheckpointError, match=f'a.pth .*{says}.* load_from=a.pth'):
        check_training(content, 'a.pth')


@pytest.mark.parametrize('content', [3, [], {}, dict(state_dict={}), dict(meta=1)])
def test_no_training(content):
    with pytest.raises(CheckpointError, match=r'a\.pth holds no training to resume'):
        check_training(content, 'a.pth')


GROUP, STATE = ('optimizer', 'param_groups', 0), ('optimizer', 'state')
SCHEDULER = ('param_schedulers', 0)


def with_momentum(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict], None]:
    def change_all(content: Any) -> None:
        for state in content['optimizer']['state'].values():
            state['momentum_buffer'] = change(state['momentum_buffer'])

    return change_all


#: Of another run than the config's.
OTHERS = {
    'no group': (holding([], 'optimizer', 'param_groups'), 'optimizer'),
    'no learning rate': (without(*GROUP, 'lr'), 'optimizer'),
    'no momentum': (without(*GROUP, 'momentum'), 'optimizer'),
    'learning rate': (holding('x', *GROUP, 'lr'), 'optimizer'),
    'parameters': (holding([0, 1], *GROUP, 'params'), r'optimizer .*\(ValueError: '),
    'state': (holding([1], *STATE), 'optimizer'),
    'no parameter': (holding({}, *STATE, 10**6), 'optimizer'),
    'no state': (holding(3, *STATE, 0), 'optimizer'),
    'shape': (holding(dict(momentum_buffer=torch.ones(7)), *STATE, 0), 'optimizer'),
    'momentum': (holding(dict(momentum_buffer='x'), *STATE, 0), 'optimizer'),
    'learning rate of nothing': (
        holding(float('nan'), *GROUP, 'lr'),
        r'optimizer .*\(its lr is nan\)',
    ),
    'learning rate without end': (
        holding(float('inf'), *GROUP, 'lr'),
        r'optimizer .*\(its lr is inf\)',
    ),
    'long learning rate': (holding(2**1024 - 1, *GROUP, 'lr'), r'optimizer .*its lr is 1'),
    'negative learning rate': (holding(-1, *GROUP, 'lr'), r'optimizer .*\(its lr is -1\)'),
    'negative momentum': (
        holding(-3.0, *GROUP, 'momentum'),
        r'optimizer .*\(its momentum is -3.0\)',
    ),
    'momentum of nothing': (
        with_momentum(lambda buffer: buffer * float('nan')),
        r'optimizer .*\(numbers in its momentum_buffer are nan or inf\)',
    ),
    'momentum without end': (
        with_momentum(lambda buffer: buffer + float('inf')),
        r'optimizer .*\(numbers in its momentum_buffer are nan or inf\)',
    ),
    'complex momentum': (
        with_momentum(lambda buffer: torch.complex(buffer, buffer)),
        r'optimizer .*\(its momentum_buffer is complex\)',
    ),
    'base settings': (holding([3], 'optimizer', 'base_param_settings'), 'optimizer'),
    'no schedulers': (
        without('param_schedulers'),
        r'param_schedulers .*\(0 in the file, 2 in the config',
    ),
    'more schedulers': (
        lambda content: content['param_schedulers'].append({}),
        r'param_schedulers .*\(3 in the file, 2 in the config',
    ),
    'schedulers': (holding(3, 'param_schedulers'), 'param_schedulers'),
    'scheduler': (holding(3, *SCHEDULER), 'param_schedulers'),
    'last step': (holding('x', *SCHEDULER, 'last_step'), 'param_schedulers'),
    'no last step': (without(*SCHEDULER, 'last_step'), 'param_schedulers'),
    'method': (holding(0, *SCHEDULER, 'step'), 'param_schedulers'),
    'base values': (holding([1.0, 2.0], *SCHEDULER, 'base_values'), 'param_schedulers'),
    'factor': (holding(float('nan'), *SCHEDULER, 'gamma'), 'param_schedulers'),
    'milestones': (holding({'a': 1}, *SCHEDULER, 'milestones'), 'param_schedulers'),
    'kinds': (lambda content: content['param_schedulers'].reverse(), 'param_schedulers'),
    'generators': (holding(3, 'random_state'), 'random_state'),
    'generator': (holding([dict(python=3)], 'random_state'), r'random_state .*\(TypeError'),
}


@pytest.mark.parametrize('name', OTHERS)
def test_of_another_run(checkpoint, tmp_path, name):
    content = torch.load(checkpoint, weights_only=True)
    change, says = OTHERS[name]
    change(content)
    path = tmp_path / 'a.pth'
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=f'{path} cannot be resumed, its {says}'):
        resumed(path, tmp_path / 'work')
    assert not list(tmp_path.glob('work/*.pth'))


def test_more_iterations_than_there_are(checkpoint, tmp_path):
    """mmengine would skip as many batches before it ends."""
    content = torch.load(checkpoint, weights_only=True)
    content['meta']['iter'] = 10**9
    torch.save(content, tmp_path / 'a.pth')
    loop = dict(type='IterBasedTrainLoop', max_iters=4)
    with pytest.raises(CheckpointError, match=r'1000000000 iterations, .* ends at 4: '):
        resumed(tmp_path / 'a.pth', tmp_path / 'work', train_cfg=loop)


def test_more_epochs_than_there_are(checkpoint, tmp_path):
    """mmengine would end at once, as if it had trained."""
    content = torch.load(checkpoint, weights_only=True)
    for epochs in (2**30, 3):
        content['meta']['epoch'] = epochs
        torch.save(content, tmp_path / 'a.pth')
        with pytest.raises(CheckpointError, match=f'{epochs} epochs, .* ends at 2: raise'):
            resumed(tmp_path / 'a.pth', tmp_path / 'work')
    content['meta']['epoch'] = 2
    torch.save(content, tmp_path / 'a.pth')
    resumed(tmp_path / 'a.pth', tmp_path / 'work')


def test_momentum_that_is_expanded(checkpoint, tmp_path):
    """One number in the place of many cannot be changed where it is."""
    content = torch.load(checkpoint, weights_only=True)
    ends = []
    for name, change in (
        ('whole', torch.zeros_like),
        ('expanded', lambda buffer: torch.zeros(()).expand(buffer.shape)),
    ):
        with_momentum(change)(content)
        torch.save(content, tmp_path / f'{name}.pth')
        resumed(tmp_path / f'{name}.pth', tmp_path / name)
        ends.append(torch.load(tmp_path / name / 'epoch_2.pth', weights_only=True))
    for entry in ('state_dict', 'optimizer'):
        torch.testing.assert_close(ends[1][entry], ends[0][entry], rtol=0, atol=0)


class TestAdam:
    """Its steps are tensors, and its squares may have no end in half precision."""

    WRAPPER = dict(optimizer=dict(type='AdamW', lr=0.01))

    @pytest.fixture(scope='class')
    def adams(self, tmp_path_factory) -> Path:
        folder = tmp_path_factory.mktemp('adam')
        tiny_runner(folder, **OPTIONS, optim_wrapper=self.WRAPPER).train()
        return folder / 'epoch_1.pth'

    def resume(self, adams, tmp_path, *keys, value):
        content = torch.load(adams, weights_only=True)
        holding(value, *keys)(content)
        torch.save(content, tmp_path / 'a.pth')
        resumed(tmp_path / 'a.pth', tmp_path / 'work', optim_wrapper=self.WRAPPER)

    def test_squares_without_end(self, adams, tmp_path):
        content = torch.load(adams, weights_only=True)
        squares = torch.full_like(content['optimizer']['state'][0]['exp_avg_sq'], torch.inf)
        self.resume(adams, tmp_path, *STATE, 0, 'exp_avg_sq', value=squares)
        assert (tmp_path / 'work' / 'epoch_2.pth').exists()

    @pytest.mark.parametrize(
        'step', [torch.tensor(torch.nan), torch.tensor(-1.0), torch.ones(2)]
    )
    def test_steps(self, adams, tmp_path, step):
        with pytest.raises(
            CheckpointError, match=r'optimizer .*\(its step is not a count\)'
        ):
            self.resume(adams, tmp_path, *STATE, 0, 'step', value=step)

    @pytest.mark.parametrize('betas', [(0.9, -0.5), (5.0, 0.999), (0.9, float('nan'))])
    def test_betas(self, adams, tmp_path, betas):
        with pytest.raises(CheckpointError, match='its optimizer is broken'):
            self.resume(adams, tmp_path, *GROUP, 'betas', value=betas)


@pytest.mark.parametrize('seed', [0, 2**32 - 1, None])
def test_seeds(checkpoint, seed):
    content = torch.load(checkpoint, weights_only=True)
    content['meta']['seed'] = seed
    check_training(content, 'a.pth')


def test_options_that_an_earlier_torch_did_not_have(tmp_path):
    wrapper = dict(
        optimizer=dict(type='SGD', lr=0.5, momentum=0.9, weight_decay=1e-4),
        paramwise_cfg=dict(norm_decay_mult=0.0),
    )
    tiny_runner(tmp_path, **OPTIONS, optim_wrapper=wrapper).train()
    content = torch.load(tmp_path / 'epoch_1.pth', weights_only=True)
    optimizer = content['optimizer']
    for group in (*optimizer['param_groups'], optimizer['base_param_settings']):
        del group['foreach'], group['maximize']
    torch.save(content, tmp_path / 'a.pth')
    resumed(tmp_path / 'a.pth', tmp_path / 'work', optim_wrapper=wrapper)
    whole, rest = (
        torch.load(folder / 'epoch_2.pth', weights_only=True)
        for folder in (tmp_path, tmp_path / 'work')
    )
    for entry in ('state_dict', 'optimizer'):
        torch.testing.assert_close(rest[entry], whole[entry], rtol=0, atol=0)


def test_histories_in_another_order(checkpoint, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    histories = content[HUB]['log_scalars']
    before = {name: history['log_history'] for name, history in histories.items()}
    for name, history in histories.items():
        histories[name] = dict(reversed(history.items()))
    torch.save(content, tmp_path / 'a.pth')
    log = resumed(tmp_path / 'a.pth', tmp_path / 'work').message_hub.log_scalars
    for name, values in before.items():
        assert log[name].data[0][: len(values)].tolist() == values.tolist()


def test_no_schedulers_in_the_config(checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match='2 in the file, 0 in the config'):
        resumed(checkpoint, tmp_path, param_scheduler=None)


def test_other_schedules_of_the_same_kinds(checkpoint, tmp_path):
    schedules = [dict(type='MultiStepLR', milestones=[1, 3]), OPTIONS['param_scheduler'][1]]
    resumed(checkpoint, tmp_path, param_scheduler=schedules)
    assert (tmp_path / 'epoch_2.pth').exists()


@pytest.mark.parametrize('key', ['best_ckpt', 'best_ckpt_a'])
def test_a_best_checkpoint_of_others_is_forgotten(checkpoint, tmp_path, key):
    content = torch.load(checkpoint, weights_only=True)
    content['message_hub']['runtime_info'][key] = str(tmp_path / 'best_a.pth')
    (tmp_path / 'best_a.pth').touch()
    torch.save(content, tmp_path / 'a.pth')
    runner = resumed(tmp_path / 'a.pth', tmp_path / 'work')
    assert runner.message_hub.get_info(key) is None


@pytest.mark.parametrize('out_dir', [None, 'here'])
def test_it_is_looked_for_where_the_run_writes(checkpoint, tmp_path, out_dir):
    work = tmp_path / 'work'
    own = (tmp_path / out_dir / 'work' if out_dir else work) / 'best_a.pth'
    own.parent.mkdir(parents=True)
    own.touch()
    content = torch.load(checkpoint, weights_only=True)
    content['message_hub']['runtime_info']['best_ckpt'] = '/moved/best_a.pth'
    torch.save(content, tmp_path / 'a.pth')
    out_dir = out_dir and str(tmp_path / out_dir)
    hooks = dict(checkpoint=dict(type='CheckpointHook', out_dir=out_dir))
    runner = resumed(tmp_path / 'a.pth', work, default_hooks=hooks)
    assert runner.message_hub.get_info('best_ckpt') == str(own)


class TestOwnFile:
    def test_own(self, tmp_path):
        own = tmp_path / 'best_a.pth'
        own.touch()
        for path in (own, '/moved/best_a.pth', 'best_a.pth', '../../best_a.pth'):
            assert own_file(str(path), ['/nowhere', str(tmp_path)]) == str(own)

    @pytest.mark.parametrize(
        'name',
        [
            *('.', '..', '', 'best_x/..', 'best_x/', 'mine.pth', 'best_folder'),
            *('best_link', 'best_links', 'best_nothing', 'best_\0', 'best_' + 'x' * 5000),
        ],
    )
    def test_of_others(self, tmp_path, name):
        work = tmp_path / 'work'
        (work / 'best_folder').mkdir(parents=True)
        (work / 'best_x').mkdir()
        (work / 'mine.pth').touch()
        (tmp_path / 'best_victim').touch()
        (work / 'best_link').symlink_to(tmp_path / 'best_victim')
        (work / 'best_links').symlink_to(work / 'best_folder')
        for path in (name, os.path.join(work, name), f'/{name}'):
            assert own_file(path, [str(work)]) is None


def test_the_log_goes_on(checkpoint, tmp_path):
    """What was logged before is there again, for the means."""
    runner = resumed(checkpoint, tmp_path)
    buffer = runner.message_hub.log_scalars['train/loss']
    assert isinstance(buffer, HistoryBuffer)
    # Two epochs of two iterations.
    assert len(buffer.data[0]) == 4
