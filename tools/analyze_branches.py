"""Show what the branches of a trained model do: a table, CSV and pictures."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from mmrep.analysis import (
    BranchReport,
    analyze_branches,
    draw_kernels,
    draw_shares,
    write_table,
)
from mmrep.checkpoints import (
    atomic_writes,
    load_strictly,
    read_checkpoint,
    refuse_existing,
    state_dict_of,
)
from mmrep.cli import (
    ToolParser,
    add_config_options,
    config_argument,
    name_argument,
    path_argument,
    run_tool,
    shape_argument,
)
from mmrep.deployment import build_model, input_shape, read_config
from mmrep.deployment.running import run_form, seeded_input
from mmrep.errors import UserError, printable
from mmrep.reparam import NotFoldableError

FILES = ('branches.csv', 'shares.png', 'kernels.png')


def parse_args() -> argparse.Namespace:
    parser = ToolParser(
        example='repvgg-tiny_1xb64_digits epoch_15.pth --out branches',
        description='Show for each block of a trained model: the share of each branch in '
        'the equivalent kernel, the range of its weights (a wide range costs accuracy in '
        f'int8), and the mean absolute kernel. Writes {", ".join(FILES)}.',
    )
    parser.add_argument('config', type=config_argument, help='config of the train form')
    parser.add_argument('checkpoint', type=name_argument, help='train-form checkpoint')
    parser.add_argument(
        '--out', type=path_argument, required=True, help='folder to write into'
    )
    parser.add_argument(
        '--shape',
        type=shape_argument,
        help='shape C,H,W or C H W of an input, for kernels that depend on its size '
        '(default: from the config)',
    )
    parser.add_argument('--overwrite', action='store_true', help='replace existing files')
    add_config_options(parser)
    return parser.parse_args()


def show(reports: Sequence[BranchReport], files: Sequence[Path]) -> None:
    """Print the reports."""
    branches = list(dict.fromkeys(branch for r in reports for branch in r.shares))
    # Without their common prefix.
    names = [branch.removeprefix('branch_') for branch in branches]
    table = Table('block', *names, 'cancelled', 'max |W|', 'peak', 'channels')
    for column in table.columns:
        column.no_wrap = True
    for column in table.columns[1:]:
        column.justify = 'right'
    for report in reports:
        shares = (report.shares.get(branch) for branch in branches)
        table.add_row(
            printable(report.name),
            *('' if share is None else f'{share:.1%}' for share in shares),
            f'{report.cancelled:.1%}',
            f'{report.largest:.3g}',
            f'{report.peak:.1f}',
            f'{report.channels:.1f}',
        )
    console = Console(markup=False, emoji=False, highlight=False)
    # The table may be wider than the terminal: names must not be cut.
    options = console.options.update(width=1000)
    width = Measurement.get(console, options, table).maximum
    Console(width=max(width, console.width)).print(table)
    console.print(
        "shares of the branches' kernels, by Frobenius norm · cancelled: how much they "
        'cancel each other · peak: max |W| over the root mean square of W · channels: '
        'max |W| of the largest output channel over that of the median one',
        soft_wrap=True,
    )
    for number, file in enumerate(files):
        console.print(
            f'{"written:" if number == 0 else "":9}{printable(file)}', soft_wrap=True
        )


def main() -> None:
    args = parse_args()
    config = read_config(args.config, args.cfg_options)
    files = [args.out / name for name in FILES]
    refuse_existing(*files, overwrite=args.overwrite)
    model = build_model(config, unset=True)
    source = read_checkpoint(args.checkpoint)
    load_strictly(model, state_dict_of(source, args.checkpoint), args.checkpoint)
    if any(getattr(block, 'lacks_size', False) for block in model.modules()):
        shape = (1, *(args.shape or input_shape(config)))
        run_form(model, seeded_input(shape, seed=0), 'train')
    try:
        reports = analyze_branches(model)
    except (NotFoldableError, ValueError) as error:
        raise UserError(f'{args.config} cannot be analyzed: {error}') from None
    with atomic_writes(*files) as (table, shares, kernels):
        write_table(reports, table)
        draw_shares(reports, shares)
        draw_kernels(reports, kernels)
    show(reports, files)


if __name__ == '__main__':
    run_tool(main)
