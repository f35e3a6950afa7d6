"""Checkpoints of a real training run."""

from pathlib import Path

import pytest
from tiny_runner import tiny_runner

from mmrep.checkpoints import use_safe_reading


@pytest.fixture(scope='session')
def run_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What mmengine's Runner writes: with an optimizer, schedulers and the logs."""
    work_dir = tmp_path_factory.mktemp('run')
    runner = tiny_runner(
        work_dir,
        param_scheduler=[
            dict(type='LinearLR', start_factor=0.1, end=1, by_epoch=False),
            # Its state holds a function.
            dict(type='OneCycleLR', eta_max=0.1, total_steps=2, by_epoch=False),
        ],
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.01)),
    )
    runner.train()
    return work_dir / 'epoch_1.pth'


@pytest.fixture
def safe_reading() -> None:
    """Register the loader, as the tools do."""
    use_safe_reading()
