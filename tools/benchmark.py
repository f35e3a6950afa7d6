"""Time the models of configs, in turns with their peers."""

import argparse
import json
import os
import re
from dataclasses import asdict
from pathlib import Path

# Set before torch is imported: its profiler would log on standard error.
os.environ.setdefault('KINETO_LOG_LEVEL', '99')

import torch
from rich.console import Console
from rich.table import Table

from mmrep.benchmark import TASKS, Benchmark, benchmark, draw_plane, published_accuracy
from mmrep.checkpoints import atomic_write, out_path, refuse_existing
from mmrep.cli import (
    ToolParser,
    add_config_options,
    config_argument,
    name_argument,
    path_argument,
    run_tool,
    shape_argument,
    whole_number,
)
from mmrep.deployment import read_config
from mmrep.errors import UserError, printable

_TITLES = {
    'train': 'training step (forward and backward)',
    'norm_eval': 'training step with norm_eval',
    'eval': 'evaluation of the train form',
    'deploy': 'deploy form',
}


def parse_args() -> argparse.Namespace:
    parser = ToolParser(
        example='repvgg-a0 repvgg-b1 --plane plane.png',
        description='Time training and inference of the models of configs, in turns with '
        "mmpretrain's and timm's RepVGG and with the plain ResNet, where installed.",
    )
    parser.add_argument(
        'configs', nargs='+', type=config_argument, metavar='CONFIG', help='config file'
    )
    parser.add_argument(
        '--batch-size',
        type=whole_number(1, 2**31 - 1),
        default=8,
        help='images in a batch (default: 8)',
    )
    parser.add_argument(
        '--shape',
        type=shape_argument,
        help='shape C,H,W or C H W of an image (default: from the config)',
    )
    parser.add_argument('--device', default='cpu', help='cpu (default) or cuda')
    parser.add_argument(
        '--amp', action='store_true', help='compute in bfloat16 where autocast does'
    )
    parser.add_argument(
        '--tasks',
        nargs='+',
        choices=TASKS,
        default=TASKS,
        help='what to measure (default: all)',
    )
    parser.add_argument(
        '--rounds',
        type=whole_number(1),
        default=15,
        help='how often each model is timed (default: 15)',
    )
    parser.add_argument(
        '--no-compile', action='store_true', help='do not measure torch.compile'
    )
    parser.add_argument('--out', type=name_argument, help='write the figures to this .json')
    parser.add_argument(
        '--plane', type=path_argument, help='draw the speed-accuracy plane into this .png'
    )
    add_config_options(parser)
    args = parser.parse_args()
    args.configs = list(map(Path, args.configs))
    return args


def check(args: argparse.Namespace) -> None:
    """Refuse arguments that would fail after minutes of measuring."""
    if not re.fullmatch(r'cpu|cuda(:\d{1,2})?', args.device):
        raise UserError(f'--device {args.device} is unknown: give cpu, cuda or cuda:1')
    if args.device != 'cpu' and not torch.cuda.is_available():
        raise UserError(
            f'--device {args.device} needs a GPU, and there is none here: leave it out'
        )
    if (torch.device(args.device).index or 0) >= max(torch.cuda.device_count(), 1):
        raise UserError(f'--device {args.device} is not one of the GPUs here: give another')
    if args.out:
        args.out = out_path(args.out, '.json')
    if args.plane and args.plane.suffix != '.png':
        raise UserError(f'--plane {args.plane} must end in .png: give such a name')
    if args.plane and 'eval' not in args.tasks:
        raise UserError('--plane needs eval among --tasks: add it')
    if args.plane and not any(map(published_accuracy, args.configs)):
        raise UserError(
            'no metafile.yml has an accuracy of these configs: leave --plane out'
        )
    for path in args.configs:
        read_config(path, args.cfg_options)
    refuse_existing(*filter(None, (args.out, args.plane)), overwrite=True)


def show(result: Benchmark) -> None:
    """Print a benchmark as tables."""
    console = Console(markup=False, emoji=False)
    shape = 'x'.join(map(str, result.shape))
    name = printable(result.config)
    console.print(f'\n{name} ({result.device}, {result.dtype}, {shape})', style='bold')
    sizes = Table('model', 'parameters', 'multiply-adds')
    for name, size in result.sizes.items():
        sizes.add_row(name, f'{size["parameters"]:,}', f'{size["flops"]:,}')
    console.print(sizes)
    for task in dict.fromkeys(timing.task for timing in result.timings):
        timings = [timing for timing in result.timings if timing.task == task]
        table = Table(
            'model',
            'median ms',
            'IQR ms',
            'relative to mmrep',
            'peak MiB',
            title=_TITLES[task],
            title_justify='left',
        )
        for timing in timings:
            table.add_row(
                timing.name,
                f'{1e3 * timing.median:.1f}',
                f'{1e3 * timing.iqr:.1f}',
                f'{timing.median / timings[0].median:.2f}',
                '' if timing.peak is None else f'{timing.peak / 2**20:.0f}',
            )
        console.print(table)


def main() -> None:
    args = parse_args()
    check(args)
    results, points = [], []
    for path in args.configs:
        config = read_config(path, args.cfg_options)
        results.append(
            benchmark(
                config,
                path.stem,
                args.batch_size,
                args.shape,
                args.device,
                args.amp,
                tuple(args.tasks),
                args.rounds,
                not args.no_compile,
            )
        )
        show(results[-1])
        accuracy = published_accuracy(path)
        if accuracy is not None:
            points.append((results[-1], accuracy))
    if args.out:
        with atomic_write(args.out) as temporary:
            temporary.write_text(json.dumps([asdict(d) for d in results], indent=2) + '\n')
    if args.plane:
        draw_plane(points, args.plane)


if __name__ == '__main__':
    run_tool(main)
