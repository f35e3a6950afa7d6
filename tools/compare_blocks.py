"""Train one network with different blocks, and compare their cost and accuracy."""

import argparse
import json
import os
import statistics
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

# Set before torch is imported: its profiler would log on standard error.
os.environ.setdefault('KINETO_LOG_LEVEL', '99')

import torch
from mmengine.config import Config
from mmengine.runner import Runner
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from mmrep.benchmark import evaluation, interleave, peak_memory, step
from mmrep.checkpoints import (
    atomic_write,
    out_path,
    refuse_existing,
    write_checkpoint,
)
from mmrep.cli import (
    ToolParser,
    add_config_options,
    config_argument,
    path_argument,
    run_tool,
    whole_number,
)
from mmrep.deployment import (
    BLOCKS,
    build_model,
    deploy_config,
    input_shape,
    read_config,
)
from mmrep.errors import ConfigError, UserError
from mmrep.quantization import Int8, Recipe, compare_recipes
from mmrep.reparam import count_parameters, switch_to_deploy

#: What is compared, by short names.
COMPARED = {
    'plain': None,
    **{name: dict(type=kind) for name, kind in BLOCKS.items()},
    'MobileOne': dict(type='mmrep.MobileOneBlock', num_convs=4),
    'branches': dict(
        type='mmrep.BranchBlock',
        branches=['3x3', '1x1', '1x3', '3x1', 'avg', 'identity'],
    ),
}
#: Blocks with large kernels, which need other bodies.
LARGE = ('DilatedReparam', 'LargeKernel')
#: RepVGG's block with weight decay of the equivalent kernel.
CUSTOM_L2 = 'RepVGG-L2'
COMPARED |= {CUSTOM_L2: COMPARED['RepVGG']}
USUAL = [name for name in COMPARED if name not in (*LARGE, CUSTOM_L2)]
METRIC = 'accuracy/top1'
RECIPES = {
    'per tensor': Recipe('minmax', per_channel=False),
    'per channel': Recipe('minmax', per_channel=True),
}


@dataclass
class Result:
    """What was measured of a block.

    Args:
        block: Its name.
        step_ms: Median time of a step, forward and backward.
        memory: The most bytes that a step holds.
        latency_ms: Median time of one image in deploy form.
        parameters: In train and in deploy form.
        accuracy: Top-1 in per cent, for each seed.
        deployed_accuracy: The same after the switch to deploy form.
        int8: The same in int8, by the recipe's name; empty if not asked for.
        sqnr: SQNR of the int8 outputs in dB, by the recipe's name.
    """

    block: str
    step_ms: float
    memory: int
    latency_ms: float
    parameters: tuple[int, int]
    accuracy: list[float]
    deployed_accuracy: list[float]
    int8: dict[str, list[float]]
    sqnr: dict[str, list[float]]


def with_block(path: str, options: dict | None, block: str) -> Config:
    """A config with a block in its backbone."""
    needed = ('train_cfg', 'val_cfg', 'optim_wrapper', 'train_dataloader')
    cfg = read_config(path, options, needed)
    backbone = cfg.model.get('backbone')
    if not (isinstance(backbone, dict) and str(backbone.get('type')).startswith('mmrep.')):
        raise ConfigError(f'{path} has no backbone of mmrep: give a classifier with one')
    if not isinstance(cfg.train_cfg.get('max_epochs'), int):
        raise ConfigError(
            f'{path} has no train_cfg.max_epochs: give a config that counts epochs'
        )
    if not isinstance(cfg.train_dataloader.get('batch_size'), int):
        raise ConfigError(
            f'{path} has no train_dataloader.batch_size: give a config with one'
        )
    if any('EMAHook' in str(hook.get('type')) for hook in cfg.get('custom_hooks') or []):
        # It swaps weights around a validation, and would not find them after the switch.
        raise ConfigError(f'{path} averages weights: leave its EMAHook out')
    backbone.block_cfg = COMPARED[block]
    if block == CUSTOM_L2:
        decay_equivalent_kernels(cfg)
    return cfg


def decay_equivalent_kernels(cfg: Config) -> None:
    """Move a config's weight decay from RepVGG's kernels to their equivalent, in place."""
    decay = cfg.optim_wrapper.optimizer.get('weight_decay')
    if not decay:
        raise ConfigError(
            f'{cfg.filename} has no optim_wrapper.optimizer.weight_decay, which '
            f'{CUSTOM_L2} needs: set it, or leave {CUSTOM_L2} out of --blocks'
        )
    hook = dict(type='mmrep.EquivalentKernelDecayHook', weight_decay=decay)
    cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), hook]
    none = dict(decay_mult=0.0)
    keys = {'branch_3x3.conv': none, 'branch_1x1.conv': none}
    cfg.merge_from_dict(dict(optim_wrapper=dict(paramwise_cfg=dict(custom_keys=keys))))


def measure(configs: dict[str, Config], rounds: int) -> dict[str, dict]:
    """Measure the cost of every block, in turns."""
    costs, steps, latencies = {}, {}, {}
    for name, cfg in configs.items():
        model, deployed = build_model(cfg), build_model(cfg)
        shape = input_shape(cfg)
        switch_to_deploy(deployed.eval())
        steps[name] = step(model, torch.rand(cfg.train_dataloader.batch_size, *shape))
        latencies[name] = evaluation(deployed, torch.rand(1, *shape))
        sizes = count_parameters(model), count_parameters(deployed)
        costs[name] = dict(parameters=sizes, memory=peak_memory(steps[name]))
    for key, runs in (('step_ms', steps), ('latency_ms', latencies)):
        for name, timed in interleave(runs, rounds).items():
            costs[name][key] = 1e3 * timed.median
    return costs


def train(
    cfg: Config, seed: int, work_dir: str, int8: bool = False
) -> tuple[float, float, dict[str, Int8]]:
    """Train a network; returns its top-1 accuracies in train form, deploy form and int8.

    Raises:
        UserError: If the forms differ by more than one image, which rounding may change.
    """
    cfg.randomness = dict(seed=seed)
    cfg.work_dir = work_dir
    cfg.log_level = 'ERROR'
    # Validate only after training, below.
    cfg.train_cfg.val_begin = cfg.train_cfg.max_epochs + 1
    cfg.default_hooks = dict(cfg.get('default_hooks') or {}, checkpoint=None)
    cfg.experiment_name = f'{Path(work_dir).name}-{seed}'
    runner = Runner.from_cfg(cfg)
    runner.train()
    metrics = runner.val_loop.run()
    if METRIC not in metrics:
        raise ConfigError(
            f'val_evaluator of {cfg.filename} gives no {METRIC}: give a classifier whose '
            "evaluator is dict(type='Accuracy', topk=(1,))"
        )
    switch_to_deploy(runner.model.eval())
    before, after = metrics[METRIC], runner.val_loop.run()[METRIC]
    if abs(before - after) > 150 / len(runner.val_dataloader.dataset):
        raise UserError(
            f'the deploy form of {Path(work_dir).name} has a top-1 of {after}, but its '
            f'train form one of {before}: report the config'
        )
    return before, after, quantized(cfg, runner.model, work_dir) if int8 else {}


def quantized(cfg: Config, model: nn.Module, folder: str) -> dict[str, Int8]:
    """Measure a model in deploy form in int8, by each recipe."""
    path = Path(folder, 'deploy.pth')
    write_checkpoint(path, model.state_dict(), {})
    recipes = list(RECIPES.values())
    _, found = compare_recipes(deploy_config(cfg), path, recipes, metric=METRIC)
    return {name: found[recipe] for name, recipe in RECIPES.items()}


def spread(values: list[float]) -> str:
    """Mean and, if there are several values, standard deviation, as text."""
    mean = f'{statistics.mean(values):.2f}'
    return f'{mean} ± {statistics.stdev(values):.2f}' if len(values) > 1 else mean


def show(console: Console, results: list[Result], seeds: int) -> None:
    columns = ('block', 'top-1', 'step', 'memory', 'latency', 'parameters')
    table = _table(*columns)
    for result in results:
        train, deploy = result.parameters
        table.add_row(
            result.block,
            spread(result.accuracy),
            f'{result.step_ms:.1f}',
            f'{result.memory / 2**20:.0f}',
            f'{result.latency_ms:.2f}',
            f'{train:,} -> {deploy:,}',
        )
    console.print(table)
    console.print(
        f'top-1: per cent, mean and standard deviation of {seeds} seeds; step: ms, '
        'forward and backward\nmemory: MiB that a step holds; latency: ms, one image in '
        'deploy form; all on one thread'
    )
    if results[0].int8:
        table = _table('block', 'fp32', *(n for recipe in RECIPES for n in (recipe, 'dB')))
        for result in results:
            cells = [spread(result.deployed_accuracy)]
            for recipe in RECIPES:
                sqnr = statistics.mean(result.sqnr[recipe])
                cells += [spread(result.int8[recipe]), f'{sqnr:.1f}']
            table.add_row(result.block, *cells)
        console.print(table)
        console.print(
            'top-1 in deploy form, and in int8 by ONNX Runtime (MinMax, all layers); '
            'dB: mean SQNR of the logits'
        )


def collected(block: str, costs: dict, runs: list[tuple]) -> Result:
    """What was measured of a block, from all seeds."""
    before, after, int8 = zip(*runs, strict=True)
    names = list(int8[0])
    return Result(
        block=block,
        **costs,
        accuracy=list(before),
        deployed_accuracy=list(after),
        int8={name: [found[name].metric for found in int8] for name in names},
        sqnr={name: [found[name].sqnr for found in int8] for name in names},
    )


def _table(*columns: str) -> Table:
    return Table(*columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))


def parse_args() -> argparse.Namespace:
    parser = ToolParser(
        example='repvgg-tiny_1xb64_digits --blocks plain RepVGG',
        description='Train the classifier of a config with one block after the other, '
        'from several seeds; print accuracy, cost of training and of the deploy form.',
    )
    parser.add_argument(
        'config', type=config_argument, help='config with an mmrep backbone'
    )
    parser.add_argument(
        '--blocks',
        nargs='+',
        choices=COMPARED,
        default=USUAL,
        help=f'blocks to compare (default: {" ".join(USUAL)})',
    )
    parser.add_argument(
        '--seeds',
        type=whole_number(1, 100),
        default=3,
        help='number of seeds to train each block with (default: 3)',
    )
    parser.add_argument(
        '--rounds',
        type=whole_number(1, 1000),
        default=15,
        help='how often each block is timed (default: 15)',
    )
    parser.add_argument(
        '--int8',
        action='store_true',
        help='also quantize each network, per tensor and per channel',
    )
    parser.add_argument('--out', type=path_argument, help='JSON file to write')
    parser.add_argument('--overwrite', action='store_true', help='replace OUT')
    add_config_options(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.out:
        args.out = out_path(args.out)
        refuse_existing(args.out, overwrite=args.overwrite)
    # A second thread gains little in networks this small, and other programs may need it.
    torch.set_num_threads(1)
    warnings.filterwarnings('ignore')
    console = Console(soft_wrap=True, highlight=False, markup=False)

    def configs() -> dict[str, Config]:
        return {b: with_block(args.config, args.cfg_options, b) for b in args.blocks}

    costs = measure(configs(), args.rounds)
    runs = [(block, seed) for seed in range(args.seeds) for block in args.blocks]
    trained: dict[str, list] = {block: [] for block in args.blocks}
    quiet = not console.is_terminal
    with TemporaryDirectory() as folder:
        for block, seed in track(runs, 'training', console=console, disable=quiet):
            found = train(configs()[block], seed, f'{folder}/{block}', args.int8)
            trained[block].append(found)
            if quiet:
                console.print(f'{block}, seed {seed}: {found[0]:.2f}')
    results = [collected(block, costs[block], trained[block]) for block in args.blocks]
    show(console, results, args.seeds)
    if args.out:
        with atomic_write(args.out) as temporary:
            temporary.write_text(json.dumps([asdict(r) for r in results], indent=2) + '\n')


if __name__ == '__main__':
    run_tool(main)
