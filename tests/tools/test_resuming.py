"""Runs that are stopped and resumed, and files that must not be."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from tool_runs import load, tool, variant

ROOT = Path(__file__).parents[2]
CLASSIFIER = ROOT / 'configs/repvgg/repvgg-tiny_1xb64_digits.py'
SEGMENTOR = ROOT / 'configs/dbb/dbb-resnet18-tiny_fcn_1xb16-1k_digits-64x64.py'


@pytest.fixture(scope='module')
def digits(tmp_path_factory) -> Path:
    """40 digits and 12 scenes to train on."""
    pytest.importorskip('sklearn')
    out = tmp_path_factory.mktemp('data') / 'digits'
    module = load('dataset_converters/digits')
    with pytest.MonkeyPatch.context() as patch:
        small = ['--scenes', '12', '6', '--per-class', '5']
        patch.setattr('sys.argv', ['digits.py', str(out), *small])
        module.main()
    return out


def assert_identical(found: Any, expected: Any, where: str = '') -> None:
    """The same to the bit, down to the tensors in lists and dicts."""
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_identical(found[key], value, f'{where}.{key}')
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for index, value in enumerate(expected):
            assert_identical(found[index], value, f'{where}.{index}')
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), where
    else:
        assert found == expected, where


class TestItIsTheRunThatItWouldHaveBeen:
    """The shipped configs of the demo on less data, to the bit."""

    @pytest.fixture
    def stopped(self, tmp_path, call):
        """Run a config whole and stopped; returns the end of both."""

        def stopped(config: Path, end: str, iteration: int, kill: bool, **entries):
            entries['custom_imports'] = dict(imports=['stop_hook'])
            whole, halves = tmp_path / 'whole', tmp_path / 'halves'
            call('train', variant(config, tmp_path, **entries), '--work-dir', whole)
            stop = dict(type='StopHook', iteration=iteration, kill=kill)
            hooks = [*entries.pop('custom_hooks', []), stop]
            stopping = variant(config, tmp_path, custom_hooks=hooks, **entries)
            if kill:
                env = dict(
                    PYTHONPATH=os.pathsep.join(
                        [str(Path(__file__).parent), os.environ.get('PYTHONPATH', '')]
                    )
                )
                done = tool('train', stopping, '--work-dir', halves, **env)
                assert done.returncode == -signal.SIGKILL
            else:
                with pytest.raises(SystemExit, match='130'):
                    call('train', stopping, '--work-dir', halves)
            assert not (halves / end).exists()
            entries['custom_hooks'] = hooks[:-1]
            going_on = variant(config, tmp_path, **entries)
            call('train', going_on, '--work-dir', halves, '--resume')
            return [
                torch.load(folder / end, weights_only=True) for folder in (whole, halves)
            ]

        return stopped

    def assert_same_end(self, whole: dict, resumed: dict) -> None:
        for checkpoint in (whole, resumed):
            del checkpoint['meta'], checkpoint['message_hub']
        assert_identical(resumed, whole)

    def test_epochs(self, digits, stopped):
        """Killed in the third of three epochs of three iterations."""
        ends = stopped(
            *(CLASSIFIER, 'epoch_3.pth', 7, True),
            **{
                'train_dataloader.dataset.data_root': f'{digits}/cls',
                'val_dataloader.dataset.data_root': f'{digits}/cls',
                'train_dataloader.batch_size': 16,
                'train_cfg': dict(by_epoch=True, max_epochs=3, val_interval=1),
                'default_hooks.checkpoint.interval': 1,
                'custom_hooks': [dict(type='EMAHook', momentum=0.5)],
            },
        )
        self.assert_same_end(*ends)

    @pytest.mark.long
    def test_iterations(self, digits, stopped):
        """Stopped in the last of six, two rounds of data, with draws in data and model."""
        loading = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')]
        drawing = [dict(type='RandomFlip', prob=0.5), dict(type='PackSegInputs')]
        ends = stopped(
            *(SEGMENTOR, 'iter_6.pth', 5, False),
            **{
                'train_dataloader.dataset.data_root': f'{digits}/seg',
                'val_dataloader.dataset.data_root': f'{digits}/seg',
                'train_dataloader.batch_size': 4,
                'train_dataloader.dataset.pipeline': loading + drawing,
                'model.decode_head.dropout_ratio': 0.5,
                'train_cfg.max_iters': 6,
                'train_cfg.val_interval': 2,
                'default_hooks.checkpoint.interval': 4,
            },
        )
        self.assert_same_end(*ends)


def rewritten(checkpoint: Path, path: Path, change: Callable[[dict], Any]) -> Path:
    """A copy of a checkpoint with a change."""
    content = torch.load(checkpoint, weights_only=False)
    change(content)
    torch.save(content, path)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder, but for logs."""
    files = (path for path in folder.rglob('*') if path.is_file())
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in files
        if path.suffix not in ('.log', '.json', '.py')
    }


class TestPathsInACheckpoint:
    """mmengine removes what was the best checkpoint, wherever that is."""

    @pytest.fixture
    def resume(self, classifier, tmp_path, call):
        """Resume a run whose file names a best checkpoint, until there is a better one."""

        def resume(best: Any) -> str:
            def name_it(checkpoint: dict) -> None:
                infos = checkpoint['message_hub']['runtime_info']
                infos.update(best_ckpt=str(best), best_score=-1.0)

            path = rewritten(classifier.checkpoint, tmp_path / 'epoch_1.pth', name_it)
            config = variant(
                classifier.config,
                tmp_path,
                **{
                    'train_cfg.max_epochs': 2,
                    'default_hooks.checkpoint.save_best': 'auto',
                    'default_hooks.checkpoint.rule': 'greater',
                },
            )
            call('train', config, '--work-dir', tmp_path / 'work', '--resume', path)
            assert list((tmp_path / 'work').glob('best_*_epoch_2.pth'))
            return ''.join(p.read_text() for p in tmp_path.glob('work/*/*.log'))

        return resume

    def test_a_victim_lives(self, tmp_path, resume):
        victim = tmp_path / 'best_things'
        victim.mkdir()
        (victim / 'precious').write_text('mine')
        log = resume(victim)
        assert (victim / 'precious').read_text() == 'mine'
        assert f'{victim} was the best checkpoint, and is not among those of' in log

    def test_the_folder_was_moved(self, tmp_path, resume):
        """What was the best is found where it is now, and makes room."""
        own = tmp_path / 'work' / 'best_accuracy_top1_epoch_1.pth'
        own.parent.mkdir()
        own.touch()
        log = resume(f'/moved/{own.name}')
        assert not own.exists()
        assert f'previous best checkpoint {own} is removed' in log

    def test_latest(self, classifier, tmp_path, call):
        """Its name is absolute in the file that tells it."""
        shutil.copytree(classifier.work_dir, tmp_path / 'work')
        (tmp_path / 'work' / 'last_checkpoint').write_text('/moved/epoch_1.pth')
        config = variant(classifier.config, tmp_path, **{'train_cfg.max_epochs': 2})
        with pytest.warns(UserWarning, match=r'/moved/epoch_1.pth does not exist: .*work/'):
            call('train', config, '--work-dir', tmp_path / 'work', '--resume')
        assert (tmp_path / 'work' / 'epoch_2.pth').exists()


def without_optimizer(checkpoint: dict) -> None:
    del checkpoint['optimizer']


def of_other_parameters(checkpoint: dict) -> None:
    checkpoint['optimizer']['param_groups'][0]['params'].pop()


def with_another_generator(checkpoint: dict) -> None:
    checkpoint['random_state'] = [dict(python=3)]


@pytest.mark.parametrize(
    ('change', 'says'),
    [
        (without_optimizer, 'cannot be resumed, it holds no optimizer: start from its'),
        (of_other_parameters, 'its optimizer is broken or does not fit the config (Value'),
        (with_another_generator, 'its random_state is broken'),
    ],
)
def test_broken(classifier, tmp_path, refused, change, says):
    """One of each place where it is found; tests/engine has the others."""
    work_dir = tmp_path / 'work'
    work_dir.mkdir()
    path = rewritten(classifier.checkpoint, work_dir / 'epoch_1.pth', change)
    (work_dir / 'last_checkpoint').write_text(str(path))
    before = contents(work_dir)
    config = variant(classifier.config, tmp_path, **{'train_cfg.max_epochs': 2})
    refused('train', config, '--work-dir', work_dir, '--resume', says=(str(path), says))
    assert contents(work_dir) == before


@pytest.mark.parametrize('config', [CLASSIFIER, SEGMENTOR], ids=lambda path: path.stem)
def test_there_is_always_a_whole_checkpoint(config):
    """mmengine removes the oldest before it writes another."""
    assert Config.fromfile(config).default_hooks.checkpoint.max_keep_ckpts > 1


class TestTheLatestIsBroken:
    @pytest.fixture
    def work_dir(self, classifier, tmp_path) -> Path:
        """With four checkpoints, of which the last is cut short."""
        for number in (1, 2, 9, 10):
            shutil.copy(classifier.checkpoint, tmp_path / f'epoch_{number}.pth')
        shutil.copy(classifier.checkpoint, tmp_path / 'best_top1_epoch_9.pth')
        os.truncate(tmp_path / 'epoch_10.pth', 20_000)
        (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_10.pth'))
        return tmp_path

    def test_the_one_before_is_offered(self, classifier, work_dir, refused):
        says = [f'{work_dir}/epoch_10.pth cannot be read as a checkpoint']
        says += [f'epoch_9.pth, can be resumed: --resume {work_dir}/epoch_9.pth']
        options = ['--work-dir', work_dir, '--resume']
        refused('train', classifier.config, *options, says=says)

    def test_if_it_is_whole(self, classifier, work_dir, refused):
        os.truncate(work_dir / 'epoch_9.pth', 10_000)
        rewritten(work_dir / 'epoch_2.pth', work_dir / 'epoch_2.pth', without_optimizer)
        says = f'can be resumed: --resume {work_dir}/epoch_1.pth'
        options = ['--work-dir', work_dir, '--resume']
        refused('train', classifier.config, *options, says=says)
