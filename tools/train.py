"""Train a classifier or a segmentor from a config."""

import argparse
import warnings

from mmengine.config import Config
from mmengine.device import get_device
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
    name_argument,
    prepare_run,
    run_tool,
)
from mmrep.deployment import model_nodes, read_config, takes_deploy
from mmrep.errors import CheckpointError, ConfigError, UserError


def parse_args() -> argparse.Namespace:
    parser = ToolParser(description='Train the model of an mmpretrain or mmseg config.')
    parser.add_argument('config', type=name_argument, help='config file')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        type=name_argument,
        metavar='CKPT',
        help='go on from a checkpoint, or from the latest one in the work dir',
    )
    parser.add_argument(
        '--amp', action='store_true', help='train with automatic mixed precision'
    )
    parser.add_argument(
        '--no-validate', action='store_true', help='do not evaluate while training'
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


def warn_of_deploy(cfg: Config) -> None:
    """Warn if a block of the model would be trained as one conv."""
    names = [
        str(node['type'])
        for node in model_nodes(cfg.model)
        if node.get('deploy') and takes_deploy(node)
    ]
    if names:
        warnings.warn(
            f'{", ".join(names)} has deploy=True: a plain network without branches is '
            'trained, which is not what re-parameterization gains from; set deploy=False '
            'unless you fine-tune a fused model',
            stacklevel=2,
        )


def read_start(cfg: Config) -> dict[str, Tensor] | None:
    """Read the checkpoint that a run starts from, before its data are prepared.

    Returns:
        The weights of a run to resume, which must be the model's.
    """
    if cfg.get('resume') and not cfg.get('load_from'):
        cfg.load_from = find_latest_checkpoint(cfg.work_dir)
    path = cfg.get('load_from')
    if not path or '://' in path:
        return None
    checkpoint = read_checkpoint(path)
    if not cfg.get('resume'):
        return None
    needed = {'state_dict', 'meta', 'message_hub'}
    if not (isinstance(checkpoint, dict) and needed <= checkpoint.keys()):
        raise CheckpointError(
            f'{path} holds no training to resume: start from its weights instead, with '
            f'--cfg-options load_from={path}'
        )
    return state_dict_of(checkpoint, path)


def main() -> None:
    args = parse_args()
    needed = ('train_cfg', 'train_dataloader', 'optim_wrapper')
    cfg = read_config(args.config, args.cfg_options, needed)
    merge_args(cfg, args)
    warn_of_deploy(cfg)
    use_safe_reading()
    state_dict = read_start(cfg)
    runner = Runner.from_cfg(cfg)
    if state_dict is not None:
        # mmengine would resume what fits.
        load_strictly(runner.model, state_dict, cfg.load_from)
    runner.train()


if __name__ == '__main__':
    run_tool(main)
