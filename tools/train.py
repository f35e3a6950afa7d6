"""Train a classifier or a segmentor from a config."""

import argparse
import logging
import re
import warnings
from contextlib import suppress
from pathlib import Path

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import RUNNERS
from mmengine.runner import Runner, find_latest_checkpoint
from torch import Tensor

from mmrep.checkpoints import (
    load_strictly,
    read_checkpoint,
    state_dict_of,
    use_safe_reading,
)
from mmrep.cli import (
    ToolParser,
    add_runner_arguments,
    config_argument,
    name_argument,
    prepare_run,
    run_tool,
)
from mmrep.deployment import deploy_argument, model_nodes, read_config
from mmrep.engine import check_training
from mmrep.errors import CheckpointError, ConfigError, UserError

#: Hooks of every training: to resume it exactly, and to open its checkpoints safely.
HOOKS = dict(
    resume=dict(type='mmrep.ResumeHook'),
    random_state=dict(type='mmrep.RandomStateHook'),
    plain_checkpoint=dict(type='mmrep.PlainCheckpointHook'),
)


def parse_args() -> argparse.Namespace:
    parser = ToolParser(
        example='repvgg-tiny_1xb64_digits --amp',
        description='Train the model of a config of mmpretrain, mmseg or mmdet.',
    )
    parser.add_argument('config', type=config_argument, help='config file')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        type=name_argument,
        metavar='CKPT',
        help='resume from CKPT, or without CKPT from the latest checkpoint in the work dir',
    )
    parser.add_argument(
        '--amp', action='store_true', help='train with automatic mixed precision'
    )
    parser.add_argument(
        '--no-validate', action='store_true', help='do not evaluate during training'
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate by the batch size',
    )
    add_runner_arguments(parser)
    return parser.parse_args()


def merge_args(cfg: Config, args: argparse.Namespace) -> None:
    """Apply the arguments to the config."""
    prepare_run(cfg, args)
    if args.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    if args.amp:
        if get_device() in ('cpu', 'mps'):
            raise UserError('--amp needs a GPU and there is none here: leave it out')
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if args.resume is not None:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    if args.auto_scale_lr:
        scale = cfg.get('auto_scale_lr')
        base = scale.get('base_batch_size') if isinstance(scale, dict) else None
        if not (isinstance(base, int) and base > 0):
            raise ConfigError(
                f'--auto-scale-lr needs auto_scale_lr=dict(base_batch_size=...) in '
                f'{args.config}'
            )
        cfg.auto_scale_lr.enable = True
    given = cfg.get('default_hooks') or {}
    if not isinstance(given, dict):
        raise ConfigError(
            f'default_hooks={given!r} is not a dict of hooks: give one, or leave it out'
        )
    hooks = {**HOOKS, **given}
    # mmengine accepts None only for its own default hooks.
    unwanted = [name for name in HOOKS if hooks[name] is None]
    cfg.default_hooks = {k: hook for k, hook in hooks.items() if k not in unwanted}


def warn_of_deploy(cfg: Config) -> None:
    """Warn if a block of the model would be trained as one conv."""
    names = [
        str(node['type'])
        for node in model_nodes(cfg.model)
        if (argument := deploy_argument(node)) and node.get(argument)
    ]
    if names:
        warnings.warn(
            f'{", ".join(names)} has deploy=True: a plain network without branches is '
            'trained, so re-parameterization gains nothing; set deploy=False unless you '
            'fine-tune a fused model',
            stacklevel=2,
        )


def read_start(cfg: Config) -> dict[str, Tensor] | None:
    """Read the checkpoint that a run starts from, before its data are prepared.

    Returns:
        The weights of a run to resume, to be loaded strictly; ``None`` otherwise.
    """
    if cfg.get('resume') and not cfg.get('load_from'):
        cfg.load_from = latest_checkpoint(Path(cfg.work_dir))
    path = cfg.get('load_from')
    if not path or '://' in path:
        return None
    if not cfg.get('resume'):
        read_checkpoint(path)
        return None
    checkpoint = read_resumable(Path(path).expanduser())
    # The order of the data depends on it, and mmengine restores it after they are built.
    randomness = cfg.get('randomness') or {}
    if randomness.get('seed') is None:
        cfg.randomness = {**randomness, 'seed': checkpoint['meta'].get('seed')}
    return state_dict_of(checkpoint, path)


def latest_checkpoint(work_dir: Path) -> str | None:
    """The latest checkpoint of a work dir, even if the work dir was moved."""
    path = find_latest_checkpoint(str(work_dir))
    moved = work_dir / Path(path or '').name
    if path and not Path(path).exists() and moved.is_file():
        warnings.warn(f'{path} does not exist: {moved} is resumed', stacklevel=2)
        return str(moved)
    return path


def read_resumable(path: Path) -> dict:
    """Read a checkpoint that holds the state of a training.

    Raises:
        CheckpointError: If it does not; the sentence names the last one before that does.
    """
    try:
        checkpoint = read_checkpoint(path)
        check_training(checkpoint, path)
    except CheckpointError as error:
        before = one_before(path)
        if before is None:
            raise
        raise CheckpointError(
            f'{error}; the checkpoint before it, {before.name}, can be resumed: '
            f'--resume {before}'
        ) from error
    return checkpoint


def one_before(path: Path) -> Path | None:
    """The last resumable checkpoint before another, as epoch_2.pth before epoch_3.pth."""
    name = re.compile(r'(.*_)(\d+)')
    parts = name.fullmatch(path.stem)
    if parts is None:
        return None
    earlier = {}
    for other in path.parent.glob(f'*{path.suffix}'):
        match = name.fullmatch(other.stem)
        if match and match[1] == parts[1] and int(match[2]) < int(parts[2]):
            earlier[int(match[2])] = other
    for _, other in sorted(earlier.items(), reverse=True):
        with suppress(CheckpointError):
            check_training(read_checkpoint(other), other)
            return other
    return None


def main() -> None:
    args = parse_args()
    needed = ('train_cfg', 'train_dataloader', 'optim_wrapper')
    cfg = read_config(args.config, args.cfg_options, needed)
    merge_args(cfg, args)
    warn_of_deploy(cfg)
    use_safe_reading()
    state_dict = read_start(cfg)
    # As the hosts' tools choose it: FlexibleRunner has FSDP and other strategies.
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    if state_dict is not None and isinstance(runner, Runner):
        # mmengine would load only the keys that fit.
        load_strictly(runner.model, state_dict, cfg.load_from)
    if cfg.get('log_level') != 'DEBUG':
        runner.logger.addFilter(is_of_no_parameter)
    runner.train()


def is_of_no_parameter(record: logging.LogRecord) -> bool:
    """Log filter: not the hundreds of records about the options of each parameter."""
    return not str(record.msg).startswith('paramwise_options -- ')


if __name__ == '__main__':
    run_tool(main)
