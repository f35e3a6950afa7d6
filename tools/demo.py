"""Train, test, re-parameterize and quantize small networks on handwritten digits.

Runs the tools that a user would run, one after the other, and ends with a table that
compares the train form of every network with its deploy form, in fp32 and in int8.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from mmrep.benchmark import evaluation, interleave
from mmrep.checkpoints import load_strictly, read_checkpoint, state_dict_of
from mmrep.cli import ToolParser, path_argument, run_tool
from mmrep.deployment import build_model, read_config
from mmrep.errors import UserError
from mmrep.reparam import branch_by_branch

ROOT = Path(__file__).resolve().parents[1]
FORMS = ('train', 'deploy')
CONSOLE = Console(soft_wrap=True, highlight=False, markup=False)


class Network(NamedTuple):
    """A network of the demo.

    Args:
        task: For the table.
        config: Path from the root.
        label: Name of the metric, for the table.
        metric: A key of what ``tools/test.py`` writes, in per cent.
        goal: The least that the demo accepts.
        tolerance: The largest difference of the two forms. Every image must keep its class;
            a pixel of a mask that lies between two classes may change it by rounding in
            float32, which the second decimal can show.
    """

    task: str
    config: str
    label: str
    metric: str
    goal: float
    tolerance: float


CLS = dict(task='classify', label='top-1', metric='accuracy/top1', goal=97, tolerance=0)
SEG = dict(task='segment', label='mIoU', metric='mIoU', goal=70, tolerance=0.02)
REPVGG, DBB = 'configs/repvgg/repvgg-tiny', 'configs/dbb/dbb-resnet18-tiny'
MOBILEONE = 'configs/mobileone/mobileone'
UNIREPLKNET = 'configs/unireplknet/unireplknet'
REPLKNET = 'configs/replknet/replknet'
EXPANDED, BLOCKS = 'configs/expanded', 'configs/blocks'
TINY, VGG = 'resnet18-tiny_1xb64_digits.py', 'tiny_1xb64_digits.py'
NETWORKS = {
    'repvgg-cls': Network(config=f'{REPVGG}_1xb64_digits.py', **CLS),
    'dbb-cls': Network(config=f'{DBB}_1xb64_digits.py', **CLS),
    'repvgg-seg': Network(config=f'{REPVGG}_fcn_1xb16-1k_digits-64x64.py', **SEG),
    'expanded-cls': Network(config=f'{EXPANDED}/expanded-{TINY}', **CLS),
    'conv-cls': Network(config=f'{EXPANDED}/dbbconv-{TINY}', **CLS),
    'acb-cls': Network(config=f'{BLOCKS}/acb-{TINY}', **CLS),
    'orepa-cls': Network(config=f'{BLOCKS}/orepa-{TINY}', **CLS),
    'mobileone-cls': Network(config=f'{BLOCKS}/mobileone-{VGG}', **CLS),
    'mobileone-s0-cls': Network(config=f'{MOBILEONE}-s0-{VGG}', **CLS),
    'qarepvgg-cls': Network(config=f'{BLOCKS}/qarepvgg-{VGG}', **CLS),
    'orepa-repvgg-cls': Network(config=f'{BLOCKS}/orepa-repvgg-{VGG}', **CLS),
    'branches-cls': Network(config=f'{BLOCKS}/branches-{VGG}', **CLS),
    'unireplknet-cls': Network(config=f'{UNIREPLKNET}-{VGG}', **CLS),
    'replknet-cls': Network(config=f'{REPLKNET}-{VGG}', **CLS),
    'dbb-seg': Network(config=f'{DBB}_fcn_1xb16-1k_digits-64x64.py', **SEG),
}


def run(log: Path, script: str, *args: str | Path) -> None:
    """Run a tool with its output in a log; raise a ``UserError`` if it fails."""
    command = [f'tools/{script}', *map(str, args)]
    CONSOLE.print(f'$ python {shlex.join(command)}')
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with open(log, 'w') as file:
        code = subprocess.call([sys.executable, *command], stdout=file, stderr=file)
    if code:
        raise UserError(f'tools/{script} ended with exit status {code}: see {log}')
    CONSOLE.print(f'  {time.perf_counter() - start:.0f} s')


def load(config: str | Path, checkpoint: Path) -> nn.Module:
    model = build_model(read_config(config))
    state_dict = state_dict_of(read_checkpoint(checkpoint), checkpoint)
    load_strictly(model, state_dict, checkpoint)
    return model


def demonstrate(network: Network, folder: Path) -> dict:
    """Train, test, fuse, test and quantize a network; measure all forms."""
    config, fused, int8 = network.config, folder / 'deploy.pth', folder / 'int8.onnx'

    def test(form: str, *files: str | Path) -> float:
        out = folder / f'{form}.json'
        options = ('--work-dir', folder, '--out', out)
        run(folder / f'test_{form}.log', 'test.py', *files, *options)
        return json.loads(out.read_text())[network.metric]

    run(folder / 'train.log', 'train.py', config, '--work-dir', folder)
    trained = Path((folder / 'last_checkpoint').read_text())
    metrics = [test('train', config, trained)]
    run(folder / 'reparam.log', 'reparam.py', config, trained, fused, '--overwrite')
    metrics.append(test('deploy', fused.with_suffix('.py'), fused))
    files = (fused.with_suffix('.py'), fused, int8)
    run(folder / 'quantize.log', 'quantize_onnx.py', *files, '--overwrite')
    quantized = json.loads(int8.with_suffix('.json').read_text())['int8']
    metrics.append(quantized['metrics']['int8'][network.metric])

    verified = torch.load(fused, weights_only=True)['meta']['mmrep']
    models = [load(config, trained), load(fused.with_suffix('.py'), fused)]
    x = torch.rand(1, *verified['input_shape'][1:])
    with branch_by_branch(models[0]):
        runs = {form: evaluation(m, x) for form, m in zip(FORMS, models, strict=True)}
        measured = interleave(runs, rounds=50)
    return {
        **network._asdict(),
        'value': metrics,
        'parameters': [sum(p.numel() for p in model.parameters()) for model in models],
        'latency_ms': [1e3 * measured[form].median for form in FORMS]
        + [1e3 * quantized['latencies']['int8']],
        'rel_l2': verified['rel_l2'],
        'layers_in_fp32': sum(layer['form'] == 'fp32' for layer in quantized['layers']),
    }


def show(rows: list[dict]) -> None:
    """Print the table; it fits into 80 columns."""
    columns = ('task', 'network', 'form', 'in %', 'parameters', 'ms', 'rel. L2')
    table = Table(*columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for row in rows:
        names = (row['task'], Path(row['config']).stem.split('_')[0])
        parameters = [f'{count:,}' for count in row['parameters']] + ['']
        for place, form in enumerate((*FORMS, 'int8')):
            table.add_row(
                *(('', '') if place else names),
                form,
                f'{row["label"]} {row["value"][place]:.2f}',
                parameters[place],
                f'{row["latency_ms"][place]:.2f}',
                f'{row["rel_l2"]:.1e}' if form == 'deploy' else '',
                end_section=form == 'int8',
            )
    CONSOLE.print(table)


def explain() -> None:
    """Print what the columns mean."""
    CONSOLE.print(
        'ms: one image, on one thread, in train form branch by branch\n'
        'rel. L2: between outputs and features of both forms\n'
        'int8: by ONNX Runtime, with a loss of at most 0.5 points'
    )


def faults(row: dict) -> list[str]:
    """Describe where a row misses the goals of the demo."""
    train, deploy, _ = row['value']
    found = []
    if min(train, deploy) < row['goal']:
        found.append(
            f'{row["config"]} reaches {min(train, deploy):.2f} %, not {row["goal"]} %'
        )
    if abs(train - deploy) > row['tolerance']:
        found.append(f'the two forms of {row["config"]} differ: {train} and {deploy} %')
    return found


def parse_args() -> argparse.Namespace:
    parser = ToolParser(description=__doc__.split('\n')[0])
    parser.add_argument(
        '--work-dir',
        type=path_argument,
        default=ROOT / 'work_dirs/demo',
        help='folder for checkpoints, logs and the table (default: work_dirs/demo)',
    )
    parser.add_argument(
        '--only',
        nargs='+',
        choices=NETWORKS,
        default=list(NETWORKS)[:3],
        help='networks to run (default: the first three)',
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    start = time.perf_counter()
    work_dir = args.work_dir.resolve()
    # The configs' paths are relative to the root.
    os.chdir(ROOT)
    # A second thread gains little in networks this small, and loses much where other
    # programs want the core.
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    torch.set_num_threads(1)
    if work_dir.is_relative_to(ROOT):
        work_dir = work_dir.relative_to(ROOT)
    converter = 'dataset_converters/digits.py'
    run(work_dir / 'data.log', converter, 'data/digits', '--overwrite')
    rows = []
    for name in args.only:
        rows.append(demonstrate(NETWORKS[name], work_dir / name))
        show(rows[-1:])
    if len(rows) > 1:
        show(rows)
    table = work_dir / 'table.json'
    table.write_text(json.dumps(rows, indent=2))
    explain()
    CONSOLE.print(f'{time.perf_counter() - start:.0f} s in all; see also {table}')
    if broken := [fault for row in rows for fault in faults(row)]:
        raise UserError('; '.join(broken))


if __name__ == '__main__':
    run_tool(main)
