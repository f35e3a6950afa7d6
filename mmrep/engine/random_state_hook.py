"""Random numbers of a resumed run."""

import logging
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_gather_object, get_rank, get_world_size
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import print_log
from mmengine.runner import IterBasedTrainLoop, Runner

from mmrep.errors import reason
from mmrep.registry import HOOKS

from .resume_hook import broken


def random_state() -> dict[str, Any]:
    """The states of this process's random number generators, in plain types.

    Their numbers are in tensors: every process has some thousand, and a checkpoint those of
    every process.
    """
    version, words, normal = random.getstate()
    kind, keys, *rest = np.random.get_state()
    state = dict(
        python=(version, torch.tensor(words), normal),
        numpy=(kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        torch=torch.get_rng_state(),
    )
    if torch.cuda.is_available():
        state['cuda'] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Set what :func:`random_state` returned; without a GPU, all but its generator."""
    version, words, normal = state['python']
    random.setstate((version, tuple(words.tolist()), normal))
    kind, keys, place, *rest = state['numpy']
    if not 0 <= place <= 624:
        # numpy has as many, and would read what is beyond.
        raise ValueError(f'the number {place} of 624')
    np.random.set_state((kind, keys.cpu().numpy(), place, *rest))
    torch.set_rng_state(state['torch'].cpu())
    if torch.cuda.is_available() and 'cuda' in state:
        torch.cuda.set_rng_state(state['cuda'].cpu())


@HOOKS.register_module()
class RandomStateHook(Hook):
    """Let a resumed run draw the random numbers that it would have drawn.

    A checkpoint gets one entry more, ``random_state``: a list with the state of every
    process. Validation leaves the states as they were, because a resumed run does not
    validate again before it goes on.

    Worker processes that persist over epochs start anew in a resumed run: what they have
    drawn is in no checkpoint. Other workers are seeded in every epoch, and by iterations
    the batches before are loaded again, so that theirs go on.
    """

    # What else draws has drawn, and CheckpointHook, at 90, has not saved yet.
    priority = 85

    def __init__(self) -> None:
        self._states: list[dict] | None = None
        self._resumed: list[dict] | None = None

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None
    ) -> None:
        """Forget the states of an earlier moment."""
        self._states = None

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Keep the states if this iteration is saved."""
        if any(_saves(hook, runner) for hook in runner.hooks):
            self._states = all_gather_object(random_state())

    def after_train_epoch(self, runner: Runner) -> None:
        """Keep the states for the checkpoint of the epoch."""
        self._states = all_gather_object(random_state())

    before_val = after_train_epoch

    def after_val(self, runner: Runner) -> None:
        """Undo what the validation has drawn."""
        set_random_state(self._states[get_rank()])

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Save the states, in the first process."""
        if self._states is not None:
            checkpoint['random_state'] = self._states
        elif get_world_size() == 1:
            checkpoint['random_state'] = [random_state()]

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Take the states of the run that goes on."""
        if not runner._resume:
            return
        self._resumed = checkpoint.get('random_state')
        if self._resumed is None:
            _warn('it holds no random_state')
        elif not isinstance(self._resumed, list):
            raise broken(runner._load_from, 'random_state')
        elif len(self._resumed) != get_world_size():
            _warn(f'it was written by {len(self._resumed)} processes')
            self._resumed = None

    def before_train(self, runner: Runner) -> None:
        """Set the states, or have it done once the loop has skipped what it has seen.

        Raises:
            CheckpointError: If they are none.
        """
        if self._resumed is None:
            return
        state, self._resumed, loop = self._resumed[get_rank()], None, runner.train_loop
        try:
            set_random_state(state)
        except Exception as error:
            # What the file holds may be anything, and so is what it raises.
            raise broken(runner._load_from, 'random_state', reason(error)) from error
        if isinstance(loop, IterBasedTrainLoop):
            loop.dataloader_iterator = _ThenSet(state, loop.dataloader_iterator, loop.iter)
        elif getattr(loop.dataloader, 'persistent_workers', False):
            _warn('its persistent_workers start anew')


class _ThenSet:
    """The batches of a loop, with the state set before the first that it trains on.

    OpenMMLab's loop skips what it has seen batch by batch, OneDL's by ``skip_iter``.
    """

    def __init__(self, state: dict, batches: Iterator, skipped: int) -> None:
        self._state, self._batches, self._left = state, batches, skipped

    def __iter__(self) -> Iterator:
        return self

    def __next__(self) -> Any:
        if self._left == 0:
            set_random_state(self._state)
        self._left -= 1
        return next(self._batches)

    def skip_iter(self, count: int) -> None:
        """Skip as many batches as were seen."""
        self._batches.skip_iter(count)
        self._left = 0


def _saves(hook: Hook, runner: Runner) -> bool:
    """Whether a hook writes a checkpoint after this iteration."""
    return (
        isinstance(hook, CheckpointHook)
        and not hook.by_epoch
        and (
            hook.every_n_train_iters(runner, hook.interval, hook.save_begin)
            or (hook.save_last and hook.is_last_train_iter(runner))
        )
    )


def _warn(why: str) -> None:
    print_log(
        f'The resumed run draws other random numbers than one that was not stopped: {why}',
        logger='current',
        level=logging.WARNING,
    )
