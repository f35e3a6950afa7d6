"""Runs that are stopped and resumed, and files that must not be."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
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
                with pytest.raises(KeyboardInterrupt):
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
