"""Checkpoints that open anywhere, and custom hooks that get back what they kept."""

from collections import Counter, OrderedDict, deque
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from tiny_runner import tiny_runner

from mmrep.checkpoints import read_checkpoint

PLAIN = dict(type='mmrep.PlainCheckpointHook')
#: What ``torch.load(weights_only=True)`` reads in every version of torch.
OPEN = dict(
    size=torch.Size([2, 3]),
    dtype=torch.float16,
    order=OrderedDict(b=1, a=2),
    tensors=[torch.arange(3.0), (1, None, 'x')],
)
#: What it does not.
CLOSED = dict(window=deque([1.0, 2.0], maxlen=4), matrix=np.eye(2))


class KeepingHook(Hook):
    """Keeps values in the message hub and in an entry of its own."""

    def __init__(self, values: dict) -> None:
        self.values = values
        self.hub = self.entry = None

    def before_train(self, runner) -> None:
        self.hub = {k: runner.message_hub.runtime_info.get(k) for k in self.values}

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        for name, value in self.values.items():
            runner.message_hub.update_info(name, value)

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        checkpoint['kept'] = dict(self.values)

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        self.entry = checkpoint['kept']


def trained(folder: Path, values: dict, **options: Any) -> KeepingHook:
    hook = KeepingHook(values)
    tiny_runner(folder, custom_hooks=[hook, PLAIN], **options).train()
    return hook


def log_of(folder: Path) -> str:
    return ''.join(path.read_text() for path in folder.glob('*/*.log'))


def same(kept: Any, value: Any) -> bool:
    if isinstance(value, np.ndarray | torch.Tensor):
        return type(kept) is type(value) and bool((kept == value).all())
    if isinstance(value, list | dict):
        pairs = (
            [(kept[k], v) for k, v in value.items()]
            if isinstance(value, dict)
            else zip(kept, value, strict=True)
        )
        return type(kept) is type(value) and all(same(*pair) for pair in pairs)
    return type(kept) is type(value) and kept == value


@pytest.mark.parametrize('values', [OPEN, CLOSED | dict(seen={1, 2}, votes=Counter('aab'))])
def test_custom_hooks_get_their_values_back(tmp_path, monkeypatch, values):
    trained(tmp_path, values)
    # As mmrep's train reads it.
    monkeypatch.setattr(
        'mmengine.runner.runner._load_checkpoint',
        lambda path, **options: read_checkpoint(path),
    )
    hook = trained(
        tmp_path / 'work',
        values,
        train_cfg=dict(by_epoch=True, max_epochs=2),
        load_from=str(tmp_path / 'epoch_1.pth'),
        resume=True,
    )
    assert same(hook.hub, values)
    assert same(hook.entry, values)


def test_what_opens_is_not_warned_of(tmp_path):
    trained(tmp_path, OPEN)
    torch.load(tmp_path / 'epoch_1.pth', weights_only=True)
    assert "only mmrep's reader opens" not in log_of(tmp_path)


def test_what_does_not_is_named_once(tmp_path):
    trained(tmp_path, CLOSED, train_cfg=dict(by_epoch=True, max_epochs=2))
    assert (tmp_path / 'epoch_2.pth').exists()
    log = log_of(tmp_path)
    for name in ('kept', *(f'message_hub.runtime_info.{name}' for name in CLOSED)):
        assert log.count(f'{name} of the checkpoints has types that torch.load') == 1


class Kind(Enum):
    ONE = 1


def test_no_object_becomes_text(tmp_path):
    trained(tmp_path, dict(kind=Kind.ONE))
    content = torch.load(tmp_path / 'epoch_1.pth', weights_only=False)
    assert content['kept']['kind'] is Kind.ONE


def test_numbers_of_numpy_in_what_mmengine_writes(tmp_path):
    class NumpyHook(Hook):
        def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
            checkpoint['meta']['palette'] = np.arange(3)
            checkpoint['optimizer']['param_groups'][0]['lr'] = np.float64(0.25)
            checkpoint['message_hub']['runtime_info']['best_score'] = np.float32(0.5)

    tiny_runner(tmp_path, custom_hooks=[NumpyHook(), PLAIN]).train()
    content = torch.load(tmp_path / 'epoch_1.pth', weights_only=True)
    assert content['meta']['palette'] == [0, 1, 2]
    assert type(content['optimizer']['param_groups'][0]['lr']) is float
    assert content['message_hub']['runtime_info']['best_score'] == 0.5
