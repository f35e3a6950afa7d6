"""Check that a checkpoint can be resumed before anything of it is used."""

import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from math import isnan
from numbers import Real
from os.path import basename, isfile, islink, join, sep
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import HistoryBuffer, print_log
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch import Tensor
from torch.optim import Optimizer

from mmrep.errors import CheckpointError, reason
from mmrep.registry import HOOKS


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)


def _is_seed(value: Any) -> bool:
    # The range that numpy accepts.
    return value is None or (type(value) is int and 0 <= value < 1 << 32)


def _are_weights(value: Any) -> bool:
    return _is_mapping(value) and all(
        isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in value.items()
    )


def _are_histories(value: Any) -> bool:
    return (
        _is_mapping(value)
        and all(isinstance(name, str) for name in value)
        and all(map(_is_history, value.values()))
    )


def _is_history(value: Any) -> bool:
    if not _is_mapping(value):
        return isinstance(value, HistoryBuffer)
    # As PlainCheckpointHook writes it.
    names = ('log_history', 'count_history', 'max_length')
    *histories, max_length = map(value.get, names)
    return (
        value.keys() == {*names}
        and _is_count(max_length)
        and all(
            isinstance(history, Tensor)
            and history.dim() == 1
            and history.dtype in (torch.float64, torch.float32, torch.int64)
            and not history.requires_grad
            for history in histories
        )
        and len(histories[0]) == len(histories[1])
    )


def _is_runtime_info(value: Any) -> bool:
    """Whether the entries that CheckpointHook reads are of the right types."""
    return _is_mapping(value) and all(
        isinstance(key, str)
        and (not key.startswith('best_score') or _is_number(item))
        and (not key.startswith('best_ckpt') or isinstance(item, str | None))
        and (
            key != 'keep_ckpt_ids' or (isinstance(item, list) and all(map(_is_count, item)))
        )
        for key, item in value.items()
    )


#: The entries that mmengine uses without checking them.
_ENTRIES: dict[tuple[str, ...], Callable[[Any], bool]] = {
    ('meta',): _is_mapping,
    ('meta', 'epoch'): _is_count,
    ('meta', 'iter'): _is_count,
    ('meta', 'seed'): _is_seed,
    ('message_hub',): _is_mapping,
    ('message_hub', 'log_scalars'): _are_histories,
    ('message_hub', 'runtime_info'): _is_runtime_info,
    ('message_hub', 'resumed_keys'): _is_mapping,
    ('optimizer',): _is_mapping,
    ('ema_state_dict',): _are_weights,
}
_OPTIONAL = {('meta', 'seed'), ('ema_state_dict',)}

#: States of optimizers that have the parameter's shape. Squares may be inf in half
#: precision: that stops a weight from changing, but does no other harm.
_SQUARES = {'exp_avg_sq', 'max_exp_avg_sq', 'square_avg'}
_STATES = {'momentum_buffer', 'exp_avg', *_SQUARES}


def check_training(checkpoint: Any, source: str | Path) -> None:
    """Check that a checkpoint holds a training that can be resumed.

    Args:
        checkpoint: What :func:`~mmrep.checkpoints.read_checkpoint` returned.
        source: The file, for the error.

    Raises:
        CheckpointError: If an entry is missing or has a wrong type.
    """
    if not (_is_mapping(checkpoint) and {'meta', 'message_hub'} <= checkpoint.keys()):
        raise CheckpointError(f'{source} holds no training to resume: {_instead(source)}')
    for keys, fits in _ENTRIES.items():
        value = checkpoint
        for key in keys[:-1]:
            value = value[key]
        if keys[-1] in value:
            if not fits(value[keys[-1]]):
                raise broken(source, '.'.join(keys))
        elif keys not in _OPTIONAL:
            raise CheckpointError(
                f'{source} cannot be resumed, it holds no {".".join(keys)}: '
                f'{_instead(source)}'
            )
    weights = checkpoint.get('state_dict')
    for key, average in checkpoint.get('ema_state_dict', {}).items():
        # EMAHook swaps the average with the weight of that name.
        name = key.removeprefix('module.')
        if name != key and not (
            _are_weights(weights)
            and name in weights
            and weights[name].shape == average.shape
        ):
            raise broken(source, 'ema_state_dict')


@HOOKS.register_module()
class ResumeHook(Hook):
    """Refuse checkpoints that cannot be resumed, and protect the files of other runs.

    mmengine reads from a checkpoint the path of the best checkpoint so far, and deletes
    that file once there is a better model, wherever it is. This hook looks for the file's
    name only in the folders of this run's checkpoints, where it is found even if the
    folder was moved; otherwise the file is kept. A checkpoint of another optimizer or
    schedule is refused.
    """

    # Runs first, so that other hooks resume only what was checked.
    priority = 'HIGHEST'

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Check a checkpoint that is resumed.

        Raises:
            CheckpointError: If it does not fit the run.
        """
        if not runner._resume:
            return
        source = runner._load_from or 'the latest checkpoint'
        check_training(checkpoint, source)
        if isinstance(runner, Runner):
            # A FlexibleRunner's strategy has its own formats, with a part per process.
            schedules = checkpoint.get('param_schedulers')
            _check_optimizers(runner.optim_wrapper, checkpoint['optimizer'], source)
            _check_schedulers(runner.param_schedulers, schedules, source)
        # mmengine would load that many batches only to skip them, or end at once as if it
        # had trained. A run that is exactly at its end may be resumed, and does nothing.
        for loop, entry, unit in (
            (IterBasedTrainLoop, 'iter', 'iterations'),
            (EpochBasedTrainLoop, 'epoch', 'epochs'),
        ):
            if not isinstance(runner.train_loop, loop):
                continue
            trained, limit = checkpoint['meta'][entry], getattr(runner, f'max_{entry}s')
            if trained > limit:
                raise CheckpointError(
                    f'{source} was trained for {trained} {unit}, and the config ends at '
                    f'{limit}: raise train_cfg.max_{entry}s'
                )
        folders = [
            _folder(hook, runner.work_dir)
            for hook in runner.hooks
            if isinstance(hook, CheckpointHook)
        ]
        infos = checkpoint['message_hub']['runtime_info']
        for key in [key for key in infos if key.startswith('best_ckpt') and infos[key]]:
            infos[key] = own_file(infos[key], folders)


def _folder(hook: CheckpointHook, work_dir: str) -> str:
    """The folder that a hook will write checkpoints to."""
    if hook.out_dir in (None, work_dir):
        return work_dir
    return join(hook.out_dir, basename(work_dir.rstrip(sep)))


def own_file(path: str, folders: list[str]) -> str | None:
    """Find the best checkpoint by its name in this run's folders; else ``None``."""
    name = basename(path)
    for folder in folders if name.startswith('best_') else ():
        own = join(folder, name)
        if isfile(own) and not islink(own):
            return own
    print_log(
        f'{path} was the best checkpoint, and is not among those of this run: it is not '
        'deleted when there is a better one',
        logger='current',
        level=logging.WARNING,
    )
    return None


def _check_optimizers(
    wrapper: OptimWrapper | OptimWrapperDict, states: dict, source: str
) -> None:
    """Load the states of the optimizers, and check that training can continue."""
    several = isinstance(wrapper, OptimWrapperDict)
    wrappers = dict(wrapper.items()) if several else {None: wrapper}
    states = states if several else {None: states}
    if wrappers.keys() != states.keys() or not all(map(_is_mapping, states.values())):
        raise broken(source, 'optimizer')
    for name, each in wrappers.items():
        before = _settings(each)
        base = states[name].get('base_param_settings')
        if _is_mapping(base) and each.base_param_settings:
            # An earlier torch wrote fewer options; torch adds them to the groups only.
            states[name]['base_param_settings'] = {**each.base_param_settings, **base}
        parameters = (p for group in each.optimizer.param_groups for p in group['params'])
        real = not any(map(torch.is_complex, parameters))
        for state, key, value in _tensors(states[name]):
            if real and value.is_complex():
                # torch would drop the imaginary part.
                raise broken(source, 'optimizer', f'its {key} is complex')
            if torch.empty_like(value, device='meta').stride() != value.stride():
                # Elements of an expanded tensor share memory; a copy can be updated.
                state[key] = value.clone()
        try:
            # A copy, since load_state_dict changes the dict.
            each.load_state_dict(dict(states[name]))
        except Exception as error:
            # Optimizers raise errors of many types.
            raise broken(source, 'optimizer', reason(error)) from error
        after = _settings(each)
        if not _alike(before, after):
            raise broken(source, 'optimizer')
        if problem := _broken_setting(before, after) or _broken_state(each.optimizer):
            raise broken(source, 'optimizer', problem)


def _settings(wrapper: OptimWrapper) -> list:
    """The settings of an optimizer, which loading a checkpoint replaces."""
    settings = [*wrapper.optimizer.param_groups, wrapper.base_param_settings]
    return [
        {key: value for key, value in entry.items() if key != 'params'}
        if _is_mapping(entry)
        else entry
        for entry in settings
    ]


def _broken_setting(own: list, given: list) -> str:
    """Describe the first setting with a number that is not valid; '' for none."""
    for entry, other in zip(own, given, strict=True):
        for key, value in entry.items() if _is_mapping(entry) else ():
            pairs = (value, other[key])
            if isinstance(value, Tensor):
                if value.shape != other[key].shape or value.dtype != other[key].dtype:
                    return f'its {key} is of another shape or dtype'
                pairs = (each.flatten().tolist() for each in pairs)
            for mine, number in zip(*map(_as_list, pairs), strict=False):
                if isinstance(number, Real) and not _can_be_set(key, mine, number):
                    return f'its {key} is {str(number)[:20]}'
    return ''


def _as_list(value: Any) -> list | tuple:
    return value if isinstance(value, list | tuple) else [value]


def _can_be_set(key: str, own: Any, number: Real) -> bool:
    """Whether a number is valid for a setting of an optimizer."""
    # An int may be larger than every float. Schedules may end just below zero.
    return number == own or (
        abs(number) <= sys.float_info.max
        and (number >= -1e-9 or not isinstance(own, Real) or own < 0)
        and (number < 1 or key != 'betas')
    )


def _tensors(states: Mapping) -> Iterator[tuple[dict, str, Tensor]]:
    """The tensors in an optimizer's states, each with the dict that it is in."""
    each = states.get('state')
    for state in filter(_is_mapping, each.values() if _is_mapping(each) else ()):
        for name, value in [*state.items()]:
            if isinstance(value, Tensor):
                yield state, name, value


def _broken_state(optimizer: Optimizer) -> str:
    """Describe what is wrong with the known states of an optimizer; '' for nothing."""
    for parameter, state in optimizer.state.items():
        if not (isinstance(parameter, Tensor) and _is_mapping(state)):
            return 'it has states of other parameters'
        if not _is_step(state.get('step', 0)):
            return 'its step is not a count'
        for name, value in state.items():
            if name not in _STATES or value is None:
                continue
            if not isinstance(value, Tensor) or value.shape != parameter.shape:
                return f'its {name} is of another shape'
            if value.isnan().any() or (name not in _SQUARES and value.isinf().any()):
                return f'numbers in its {name} are nan or inf'
    return ''


def _is_step(value: Any) -> bool:
    if not _is_number(value) or (isinstance(value, Tensor) and value.is_complex()):
        return False
    return 0 <= value <= sys.float_info.max


def _check_schedulers(schedulers: Any, states: Any, source: str) -> None:
    """Check that the states fit the schedulers, in number and in kind."""
    several = isinstance(schedulers, dict)
    own = schedulers if several else {None: schedulers or []}
    given = states if several else {None: states or []}
    if not (
        _is_mapping(given)
        and own.keys() == given.keys()
        and all(isinstance(each, list) for each in given.values())
    ):
        raise broken(source, 'param_schedulers')
    for name, each in own.items():
        if len(each) != len(given[name]):
            raise broken(
                source,
                'param_schedulers',
                f'{len(given[name])} in the file, {len(each)} in the config',
            )
        for scheduler, state in zip(each, given[name], strict=True):
            # A checkpoint of PlainCheckpointHook has no functions.
            expected, found = (
                {k: v for k, v in s.items() if not callable(v)} if _is_mapping(s) else {}
                for s in (scheduler.state_dict(), state)
            )
            numbers = (n for value in found.values() for n in _as_list(value))
            if (
                expected.keys() != found.keys()
                or not _alike(expected, found)
                or any(isinstance(number, float) and isnan(number) for number in numbers)
            ):
                raise broken(source, 'param_schedulers')


def _alike(own: Any, given: Any) -> bool:
    """Whether two values are of the same type, also inside lists and dicts."""
    if own is None or given is None:
        # Such as an option that may be left out, or a best value that is not set yet.
        return isinstance(own if given is None else given, Real | str | None)
    if isinstance(own, Real):
        return isinstance(given, Real)
    if isinstance(own, list | tuple):
        return (
            isinstance(given, list | tuple)
            and len(own) == len(given)
            and all(map(_alike, own, given))
        )
    if isinstance(own, Counter):
        # Milestones, which differ from schedule to schedule.
        return _is_mapping(given) and all(isinstance(key, int) for key in given)
    if isinstance(own, Mapping):
        return (
            _is_mapping(given)
            # A later torch writes more options.
            and own.keys() <= given.keys()
            and all(_alike(own[key], given[key]) for key in own)
        )
    return isinstance(given, type(own))


def broken(source: str | Path, entry: str, detail: str = '') -> CheckpointError:
    """The error for an entry of a checkpoint that cannot be resumed."""
    detail = f' ({detail})' if detail else ''
    return CheckpointError(
        f'{source} cannot be resumed, its {entry} is broken or does not fit the config'
        f'{detail}: give the config that it was trained with, or {_instead(source)}'
    )


def _instead(source: str | Path) -> str:
    return f'start from its weights instead, with --cfg-options load_from={source}'
