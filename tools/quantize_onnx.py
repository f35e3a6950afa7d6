"""Quantize a checkpoint to an int8 ONNX file, and measure what that costs."""

import argparse
from functools import partial

from rich.console import Console
from rich.progress import track
from rich.table import Table

from mmrep.cli import (
    ToolParser,
    add_config_options,
    add_export_arguments,
    config_argument,
    drop_argument,
    export_options,
    name_argument,
    run_tool,
    whole_number,
)
from mmrep.deployment import read_config
from mmrep.errors import printable
from mmrep.quantization import AUTO, METHODS, QuantizedOnnx, quantize_onnx

_PER_CHANNEL = {AUTO: None, 'yes': True, 'no': False}


def parse_args() -> argparse.Namespace:
    parser = ToolParser(
        example='repvgg-tiny_1xb64_digits epoch_15.pth int8.onnx',
        description='Fuse a checkpoint, export it, calibrate it on images of the '
        "config's training set, quantize it by ONNX Runtime, and evaluate both forms on "
        'the validation set. Writes OUT.onnx, its record OUT.json and OUT.png, a picture '
        'of its layers.',
    )
    add = parser.add_argument
    add(
        'config',
        type=config_argument,
        help='config that the checkpoint was trained with, or its deploy config',
    )
    add('checkpoint', type=name_argument, help='checkpoint, in train, deploy or host form')
    add('out', type=name_argument, help='file to write, ending in .onnx')
    drop_help = 'largest loss of the metric, in its own unit (default: 0.5)'
    add('--max-drop', type=drop_argument, default=0.5, help=drop_help)
    add('--allow-drop', action='store_true', help='write OUT even if the loss is larger')
    add(
        '--metric',
        type=name_argument,
        help="metric of --max-drop, by the evaluator's name (default: the config's "
        'save_best, accuracy/top1 or mIoU)',
    )
    add(
        '--samples',
        type=whole_number(1),
        default=128,
        help='largest number of images to calibrate with (default: 128)',
    )
    method_help = 'how to find ranges of activations (default: auto, the better)'
    add('--method', choices=[AUTO, *METHODS], default=AUTO, help=method_help)
    channel_help = 'one scale for each channel of a weight (default: auto, the better)'
    add('--per-channel', choices=_PER_CHANNEL, default=AUTO, help=channel_help)
    add(
        '--exclude',
        nargs='+',
        default=[],
        metavar='PATTERN',
        help="layers to leave in fp32, as '*conv_seg*'",
    )
    equalize_help = 'first equalize the weight ranges of consecutive convs'
    add('--equalize', action='store_true', help=equalize_help)
    range_help = 'quantize weights to 7 bits, for CPUs without VNNI'
    add('--reduce-range', action='store_true', help=range_help)
    add_export_arguments(parser)
    add_config_options(parser)
    return parser.parse_args()


def show(console: Console, result: QuantizedOnnx) -> None:
    """Print what was done."""
    recipes = Table('recipe', 'SQNR of the outputs, dB')
    for recipe, sqnr in result.recipes.items():
        recipes.add_row(str(recipe), f'{sqnr:.1f}')
    console.print(f'{result.samples} images of the training set:', recipes)
    if result.equalized is not None:
        console.print(f'convs equalized: {result.equalized}')
    layers = Table('layer', 'form', 'max |w|: min', 'median', 'max', 'alone, dB')
    layers.columns[0].overflow = 'fold'
    for layer in result.layers:
        ranges = [f'{value:.3g}' for value in layer.ranges]
        sqnr = '' if layer.sqnr is None else f'{layer.sqnr:.1f}'
        layers.add_row(layer.name, layer.form, *ranges, sqnr)
    console.print(layers)
    outputs = Table('output', 'SQNR, dB', 'argmax agreement')
    for name, (sqnr, agreement) in result.outputs.items():
        outputs.add_row(name, f'{sqnr:.1f}', f'{agreement:.2%}')
    judged = 'validation set' if result.metric else 'calibration images'
    console.print(f'int8 against fp32 on the {judged}:', outputs)
    metrics = list(result.metrics['fp32'])
    forms = Table('form', *metrics, 'bytes', 'ms for one image', 'layers')
    for form, values in result.metrics.items():
        forms.add_row(
            form,
            *(f'{values[name]:.2f}' for name in metrics),
            f'{result.sizes[form]:,}',
            f'{1e3 * result.latencies[form]:.2f}',
            str(
                len(result.layers) - len(result.left)
                if form == 'int8'
                else len(result.layers)
            ),
        )
    console.print(forms)
    for count, drop in result.drops.items() if result.metric else ():
        console.print(f'{result.metric} lost with {count} layers left in fp32: {drop:.2f}')
    if result.metric is None:
        console.print(
            'note: the raw outputs are not one tensor from one head, so the model is '
            'judged by its raw outputs, without --max-drop'
        )
    for path in (result.out, result.record, result.picture):
        console.print(f'written: {printable(path)}', soft_wrap=True)


def main() -> None:
    args = parse_args()
    config = read_config(args.config, args.cfg_options)
    console = Console(markup=False, emoji=False)
    result = quantize_onnx(
        config,
        args.checkpoint,
        args.out,
        max_drop=args.max_drop,
        allow_drop=args.allow_drop,
        samples=args.samples,
        method=args.method,
        per_channel=_PER_CHANNEL[args.per_channel],
        exclude=args.exclude,
        equalized=args.equalize,
        reduce_range=args.reduce_range,
        metric=args.metric,
        track=partial(track, console=console, disable=not console.is_terminal),
        **export_options(args),
    )
    show(console, result)


if __name__ == '__main__':
    run_tool(main)
