"""Replace convs of a model by blocks; write the config and weights to train further."""

import argparse
from collections import defaultdict

from rich.console import Console
from rich.table import Table

from mmrep.cli import (
    ToolParser,
    add_config_options,
    busy,
    config_argument,
    name_argument,
    run_tool,
    shape_argument,
    whole_number,
)
from mmrep.deployment import BLOCKS, ExpandedFiles, expand_checkpoint, read_config
from mmrep.errors import printable


def parse_args() -> argparse.Namespace:
    parser = ToolParser(
        example='resnet18-tiny_1xb64_digits --dry-run',
        description='List the convs of a model that a block can replace, and write a '
        'config of the model with these blocks, which inherits from CONFIG. With '
        '--checkpoint, also write its weights; until it is trained further, the expanded '
        'model computes the same as the plain one.',
    )
    parser.add_argument('config', type=config_argument, help='config of the plain model')
    parser.add_argument(
        '--block',
        default='DBB',
        help=f'block to use: {", ".join(BLOCKS)}, or the type of another (default: DBB)',
    )
    parser.add_argument('--checkpoint', type=name_argument, help='weights of the model')
    parser.add_argument(
        '--out',
        type=name_argument,
        help='config to write, .py; the weights are written beside it, as .pth',
    )
    parser.add_argument(
        '--dry-run', action='store_true', help='list the convs, write nothing'
    )
    parser.add_argument(
        '--include',
        nargs='+',
        metavar='PATTERN',
        help="names of convs to replace, as 'layer?.*' or 're:...' (default: all)",
    )
    parser.add_argument(
        '--exclude', nargs='+', metavar='PATTERN', help='names of convs not to replace'
    )
    parser.add_argument(
        '--kernel-sizes',
        nargs='+',
        type=whole_number(1),
        metavar='N',
        help='sizes of the kernels to replace (default: 3 5)',
    )
    parser.add_argument(
        '--shape',
        type=shape_argument,
        help='shape C,H,W or C H W of an input (default: from the config)',
    )
    parser.add_argument('--overwrite', action='store_true', help='replace existing files')
    add_config_options(parser)
    args = parser.parse_args()
    if args.dry_run == (args.out is not None):
        parser.error('give either --out, the config to write, or --dry-run')
    if args.cfg_options and args.out:
        parser.error('--cfg-options would not be in OUT: write them into CONFIG')
    return args


def show(result: ExpandedFiles) -> None:
    """Print what was done."""
    console = Console(markup=False, emoji=False, highlight=False)
    table = Table('conv', 'norm in its block')
    for column in table.columns:
        column.overflow = 'fold'
    for conv, norm in result.expansion.replaced.items():
        table.add_row(printable(conv), 'none' if norm is None else printable(norm))
    console.print(table)
    reasons = defaultdict(list)
    for conv, reason in result.expansion.left.items():
        reasons[reason].append(conv)
    for reason, convs in reasons.items():
        more = f' and {len(convs) - 1} more' if len(convs) > 1 else ''
        console.print(f'left: {printable(convs[0])}{more}: {reason}', soft_wrap=True)
    after = '' if result.params_after is None else f' -> {result.params_after:,}'
    lines = [
        f'tried with:   an input of shape {result.shape}',
        f'convs:        {len(result.expansion.replaced)} replaced, '
        f'{len(result.expansion.left)} left',
        f'parameters:   {result.params_before:,}{after}',
    ]
    written = [printable(path) for path in (result.out, result.out_checkpoint) if path]
    lines.append(f'written:      {written[0] if written else "nothing"}')
    lines += [f'              {path}' for path in written[1:]]
    console.print('\n'.join(lines), soft_wrap=True)


def main() -> None:
    args = parse_args()
    config = read_config(args.config, args.cfg_options)
    names = ('include', 'exclude', 'kernel_sizes')
    choice = {name: getattr(args, name) for name in names if getattr(args, name)}
    with busy('expanding and comparing'):
        result = expand_checkpoint(
            config,
            args.config,
            args.block,
            args.checkpoint,
            args.out,
            args.shape,
            args.overwrite,
            **choice,
        )
    show(result)


if __name__ == '__main__':
    run_tool(main)
