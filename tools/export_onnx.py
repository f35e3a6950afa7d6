"""Export a checkpoint to ONNX, verified with ONNX Runtime."""

import argparse
from collections import defaultdict

from rich.console import Console
from rich.table import Table

from mmrep.cli import (
    ToolParser,
    add_config_options,
    add_export_arguments,
    busy,
    config_argument,
    export_options,
    name_argument,
    run_tool,
)
from mmrep.deployment import OnnxExport, export_onnx, read_config
from mmrep.errors import printable
from mmrep.reparam import Difference


def parse_args() -> argparse.Namespace:
    parser = ToolParser(
        example='repvgg-tiny_1xb64_digits epoch_15.pth net.onnx --dynamic',
        description='Load a checkpoint, write the raw outputs of its model as an ONNX '
        'graph, and verify that ONNX Runtime computes the same as PyTorch.',
    )
    add = parser.add_argument
    add(
        'config',
        type=config_argument,
        help='config that the checkpoint was trained with, or its deploy config',
    )
    add('checkpoint', type=name_argument, help='checkpoint, in train or in deploy form')
    add('out', type=name_argument, help='file to write, ending in .onnx')
    add(
        '--form',
        choices=['deploy', 'train'],
        default='deploy',
        help='fuse every block first, or export it with its branches (default: deploy)',
    )
    add_export_arguments(parser)
    add(
        '--upsample',
        action='store_true',
        help="end with the resizing of a segmentor's logits to the size of the image",
    )
    add_config_options(parser)
    return parser.parse_args()


def by_output(result: OnnxExport) -> dict[tuple[tuple[int, ...], str], list[Difference]]:
    """What was compared, by the input's shape and the output's name."""
    found = defaultdict(list)
    for shape, differences in result.comparisons:
        for name, error in differences.items():
            found[shape, name].append(error)
    return found


def show(result: OnnxExport, form: str) -> None:
    """Print what was done."""
    console = Console(markup=False, emoji=False)
    outputs = Table('inputs', 'output', 'relative L2', 'max abs', 'argmax agreement')
    for (shape, name), errors in by_output(result).items():
        inputs = f'{len(errors)} of {"x".join(map(str, shape))}'
        outputs.add_row(
            inputs,
            name,
            f'{max(error.rel_l2 for error in errors):.2e}',
            f'{max(error.max_abs for error in errors):.2e}',
            f'{min(error.argmax_agreement for error in errors):.2%}',
        )
    console.print('ONNX Runtime against PyTorch:', outputs)
    for remark in result.remarks:
        console.print(f'note: {remark}', soft_wrap=True)
    operators = Table('operator', 'count')
    for name, count in result.operators.items():
        operators.add_row(name, str(count))
    console.print(
        f'graph of the {form} form, {result.blocks} blocks, written by {result.exporter}:',
        operators,
    )
    out = printable(result.out)
    console.print(f'written: {out} ({result.size:,} bytes)', soft_wrap=True)


def main() -> None:
    args = parse_args()
    config = read_config(args.config, args.cfg_options)
    with busy('exporting and verifying'):
        result = export_onnx(
            config,
            args.checkpoint,
            args.out,
            form=args.form,
            upsample=args.upsample,
            **export_options(args),
        )
    show(result, args.form)


if __name__ == '__main__':
    run_tool(main)
