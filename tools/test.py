"""Test a checkpoint with a config."""

import argparse
import os

import mmengine
from mmengine.config import Config, ConfigDict
from mmengine.evaluator import DumpResults
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from mmrep.checkpoints import (
    load_strictly,
    out_path,
    read_checkpoint,
    refuse_unwritable,
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
    seconds_argument,
    whole_number,
)
from mmrep.deployment import check_pair, input_shape, read_config
from mmrep.errors import ConfigError, UserError
from mmrep.reparam import NotFoldableError

#: Small pictures are enlarged to at most this side, in pixels, so that labels are readable.
_LEGIBLE = 320


def parse_args() -> argparse.Namespace:
    parser = ToolParser(
        example='repvgg-tiny_1xb64_digits work_dirs/repvgg-tiny_1xb64_digits/epoch_15.pth',
        description='Test a checkpoint with a config of mmpretrain, mmseg or mmdet.',
    )
    parser.add_argument('config', type=config_argument, help='config file')
    parser.add_argument('checkpoint', type=name_argument, help='checkpoint file')
    parser.add_argument(
        '--deploy', action='store_true', help='fuse every block before testing'
    )
    parser.add_argument(
        '--out',
        '--dump',
        type=name_argument,
        help='file to write the results to: .json, .yaml or .pkl',
    )
    parser.add_argument(
        '--out-item',
        choices=['metrics', 'pred'],
        default='metrics',
        help='what goes into --out (default: metrics; pred needs .pkl)',
    )
    # With --show, two of the hosts write no pictures.
    pictures = parser.add_mutually_exclusive_group()
    pictures.add_argument('--show', action='store_true', help='show the predictions')
    pictures.add_argument(
        '--show-dir',
        type=name_argument,
        help='folder for pictures of the predictions (those of the first process)',
    )
    parser.add_argument(
        '--interval',
        type=whole_number(1),
        default=1,
        help='show every n-th sample (mmseg: batch; mmdet: all samples) (default: 1)',
    )
    parser.add_argument(
        '--wait-time',
        type=seconds_argument,
        default=2,
        help='seconds to show each picture (default: 2)',
    )
    parser.add_argument(
        '--amp', action='store_true', help='test with automatic mixed precision'
    )
    parser.add_argument(
        '--tta', action='store_true', help="use the config's test-time augmentation"
    )
    add_runner_arguments(parser)
    return parser.parse_args()


def check_out(args: argparse.Namespace) -> None:
    """Refuse a result file that could not be written, before the test runs."""
    if args.out is None:
        if args.out_item == 'pred':
            raise UserError('--out-item pred needs --out: name a .pkl file')
        return
    suffixes = ('.pkl',) if args.out_item == 'pred' else ('.json', '.yaml', '.pkl')
    refuse_unwritable(out_path(args.out, *suffixes))


def merge_args(cfg: Config, args: argparse.Namespace) -> None:
    """Apply the arguments to the config."""
    prepare_run(cfg, args)
    cfg.load_from = args.checkpoint
    if args.amp:
        cfg.test_cfg.fp16 = True
    if args.deploy:
        hooks = cfg.get('custom_hooks') or []
        if not isinstance(hooks, list | tuple):
            raise ConfigError(f'custom_hooks of {args.config} is not a list: give one')
        switch = dict(type='mmrep.SwitchToDeployHook', shape=input_shape(cfg))
        cfg.custom_hooks = [*hooks, switch]
    if args.show or args.show_dir:
        show_predictions(cfg, args)
    if args.tta:
        if not (cfg.get('tta_model') and cfg.get('tta_pipeline')):
            raise ConfigError(
                f'--tta needs tta_model and tta_pipeline in {args.config}: add them'
            )
        cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
        cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline


def show_predictions(cfg: Config, args: argparse.Namespace) -> None:
    """Turn on the host's visualization hook, which has different options in each host."""
    hook = (cfg.get('default_hooks') or {}).get('visualization')
    if hook is None:
        raise ConfigError(
            '--show and --show-dir need default_hooks.visualization: add it to '
            f'{args.config}'
        )
    hook.update(interval=args.interval, show=args.show, wait_time=args.wait_time)
    if cfg.default_scope == 'mmpretrain':
        hook.enable = True
        # A label is as high as its font, however small the image is.
        hook.rescale_factor = max(1, _LEGIBLE // min(input_shape(cfg)[1:]))
    else:
        hook.draw = True
    if args.show_dir and cfg.default_scope == 'mmdet':
        # Its hook tells a backend no names, and joins this path to the work dir.
        hook.test_out_dir = os.path.abspath(args.show_dir)
    elif args.show_dir:
        if not cfg.get('visualizer'):
            raise ConfigError(f'--show-dir needs a visualizer: add one to {args.config}')
        backend = dict(type='mmrep.PictureFolder', save_dir=args.show_dir)
        cfg.visualizer.vis_backends = [backend]


def main() -> None:
    args = parse_args()
    check_out(args)
    cfg = read_config(args.config, args.cfg_options, ('test_cfg', 'test_dataloader'))
    merge_args(cfg, args)
    use_safe_reading()
    checkpoint = read_checkpoint(args.checkpoint)
    check_pair(cfg, args.config, args.checkpoint, checkpoint)
    state_dict = state_dict_of(checkpoint, args.checkpoint)
    runner = Runner.from_cfg(cfg)
    # mmengine would load the keys that fit, and leave the rest random.
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    load_strictly(model.module if args.tta else model, state_dict, args.checkpoint)
    del checkpoint, state_dict
    if args.out_item == 'pred':
        runner.test_evaluator.metrics.append(DumpResults(out_file_path=args.out))
    try:
        metrics = runner.test()
    except NotFoldableError as error:
        raise UserError(
            f'this model cannot be fused: {error}; leave --deploy out'
        ) from None
    if args.out_item == 'metrics' and args.out:
        mmengine.dump(metrics, args.out)


if __name__ == '__main__':
    run_tool(main)
