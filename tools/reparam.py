"""Fuse a trained checkpoint into one conv for every block, and verify the result."""

import argparse

from rich.console import Console
from rich.table import Table

from mmrep.cli import (
    ToolParser,
    add_config_options,
    busy,
    config_argument,
    name_argument,
    rtol_argument,
    run_tool,
    shape_argument,
    whole_number,
)
from mmrep.deployment import Deployed, deploy_checkpoint, read_config
from mmrep.errors import printable


def parse_args() -> argparse.Namespace:
    parser = ToolParser(
        example='repvgg-tiny_1xb64_digits epoch_15.pth deploy.pth',
        description='Load a checkpoint, fuse every block, verify that the outputs are '
        'the same, and write OUT.pth and its config OUT.py, which records the SHA-256 of '
        'OUT.pth.',
    )
    parser.add_argument(
        'config', type=config_argument, help='config that the checkpoint was trained with'
    )
    parser.add_argument('checkpoint', type=name_argument, help='train-form checkpoint')
    parser.add_argument(
        'out', type=name_argument, help='deploy checkpoint to write, .pth or .safetensors'
    )
    parser.add_argument(
        '--shape',
        type=shape_argument,
        help='shape C,H,W or C H W of the input to verify with (default: from the config)',
    )
    parser.add_argument(
        '--rtol',
        type=rtol_argument,
        default=1e-4,
        help='largest relative L2 error allowed for an output (default: 1e-4)',
    )
    parser.add_argument(
        '--seed',
        type=whole_number(0),
        default=0,
        help='seed of the input to verify with (default: 0)',
    )
    parser.add_argument(
        '--host',
        action='store_true',
        help="write the model with the host's own bodies, to run without mmrep",
    )
    parser.add_argument('--overwrite', action='store_true', help='replace OUT and OUT.py')
    add_config_options(parser)
    return parser.parse_args()


def show(result: Deployed) -> None:
    """Print what was done."""
    console = Console(markup=False, emoji=False)
    verification = result.verification
    outputs = Table('output', 'relative L2', 'max abs', 'argmax', 'input dependence')
    outputs.columns[0].overflow = 'fold'
    for name, error in verification.outputs.items():
        change = verification.dependence.get(name)
        outputs.add_row(
            name,
            f'{error.rel_l2:.2e}',
            f'{error.max_abs:.2e}',
            f'{error.argmax_agreement:.2%}',
            '' if change is None else f'{change:.2e}',
        )
    if (name := verification.worst_block) is not None:
        worst = f'{verification.blocks[name].worst:.2e}'
        outputs.add_row(f'{len(verification.blocks)} blocks, worst: {name}', worst)
    console.print(f'verified on an input of shape {result.shape}:')
    console.print(outputs)
    for remark in verification.remarks():
        console.print(f'note: {remark}', soft_wrap=True)
    report = result.report
    console.print(
        f'blocks fused: {len(report.switched)}\n'
        f'parameters:   {report.params_before:,} -> {report.params_after:,}\n'
        f'file size:    {result.bytes_before:,} -> {result.bytes_after:,} bytes\n'
        f'written:      {printable(result.out)}\n'
        f'              {printable(result.out_config)}',
        soft_wrap=True,
    )


def main() -> None:
    args = parse_args()
    config = read_config(args.config, args.cfg_options)
    with busy('fusing and verifying'):
        result = deploy_checkpoint(
            config,
            args.checkpoint,
            args.out,
            shape=args.shape,
            rtol=args.rtol,
            seed=args.seed,
            overwrite=args.overwrite,
            source_config=args.config,
            host=args.host,
        )
    show(result)


if __name__ == '__main__':
    run_tool(main)
