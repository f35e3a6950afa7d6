"""Save and restore the states of the random number generators."""

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

    Arrays become tensors, since a state has thousands of numbers, and a checkpoint holds
    the states of every process.
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
    """Set what :func:`random_state` returned; without a GPU, skip the GPU's state."""
    version, words, normal = state['python']
    random.setstate((version, tuple(words.tolist()), normal))
    kind, keys, place, *rest = state['numpy']
    if not 0 <= place <= 624:
        # numpy does not check it, and would read beyond its 624 numbers.
        raise ValueError(f'position {place} in a state of 624 numbers')
    np.random.set_state((kind, keys.cpu().numpy(), place, *rest))
    torch.set_rng_state(state['torch'].cpu())
    if torch.cuda.is_available() and 'cuda' in state:
        torch.cuda.set_rng_state(state['cuda'].cpu())


@HOOKS.register_module()
class RandomStateHook(Hook):
    """Let a resumed run draw the same random numbers as an uninterrupted run.

    A checkpoint gets an additional entry, ``random_state``: a list with the states of every
    process. Validation does not change the states, because a resumed run does not repeat
    the validation before it continues.

    Persistent workers of a data loader start anew in a resumed run, since no checkpoint has
    their states. Other workers are seeded in every epoch; a loop by iterations loads the
    earlier batches again, so the workers continue as in an uninterrupted run.
    """

    # After the hooks that draw random numbers, before CheckpointHook (90) saves.
    priority = 85

    def __init__(self) -> None:
        self._states: list[dict] | None = None
        self._resumed: list[dict] | None = None

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None
    ) -> None:
        """Discard the states kept before this iteration."""
        self._states = None

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Keep the states if a checkpoint is saved after this iteration."""
        if any(_saves(hook, runner) for hook in runner.hooks):
            self._states = all_gather_object(random_state())

    def after_train_epoch(self, runner: Runner) -> None:
        """Keep the states for the checkpoint of the epoch."""
        self._states = all_gather_object(random_state())

    before_val = after_train_epoch

    def after_val(self, runner: Runner) -> None:
        """Restore the states from before the validation."""
        set_random_state(self._states[get_rank()])

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add the states to the checkpoint, in the first process."""
        if self._states is not None:
            checkpoint['random_state'] = self._states
        elif get_world_size() == 1:
            checkpoint['random_state'] = [random_state()]

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Take the states from the checkpoint of a resumed run."""
        if not runner._resume:
            return
        self._resumed = checkpoint.get('random_state')
        if self._resumed is None:
            _warn('the checkpoint holds no random_state')
        elif not isinstance(self._resumed, list):
            raise broken(runner._load_from, 'random_state')
        elif len(self._resumed) != get_world_size():
            _warn(f'the checkpoint was written by {len(self._resumed)} processes')
            self._resumed = None

    def before_train(self, runner: Runner) -> None:
        """Set the states; a loop by iterations sets them again after it skipped batches.

        Raises:
            CheckpointError: If the states are not valid.
        """
        if self._resumed is None:
            return
        state, self._resumed, loop = self._resumed[get_rank()], None, runner.train_loop
        try:
            set_random_state(state)
        except Exception as error:
            # The file may hold anything, so the error may be of any type.
            raise broken(runner._load_from, 'random_state', reason(error)) from error
        if isinstance(loop, IterBasedTrainLoop):
            loop.dataloader_iterator = _ThenSet(state, loop.dataloader_iterator, loop.iter)
        elif getattr(loop.dataloader, 'persistent_workers', False):
            _warn("its data loader's persistent_workers start anew")


class _ThenSet:
    """The batches of a loop, with the states set before the first one that it trains on.

    OpenMMLab's loop skips the seen batches one by one, OneDL's with ``skip_iter``.
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
        """Skip ``count`` batches, which are all that were seen."""
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
        f'The resumed run draws other random numbers than an uninterrupted one: {why}',
        logger='current',
        level=logging.WARNING,
    )
