"""Measure what mmrep promises of its speed, side by side with the alternatives.

    make bench

Each line is the ratio of two figures. Times are medians of runs in turns, in one process
or of whole processes.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

# Read when torch is imported: its profiler would log on standard error.
os.environ.setdefault('KINETO_LOG_LEVEL', '99')

import torch
from mmengine.config import Config
from onnx import ModelProto
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmrep.benchmark import (
    BenchmarkModel,
    Run,
    evaluation,
    interleave,
    kept_memory,
    models_of,
    randomise_statistics,
    step,
)
from mmrep.benchmark import compiled as compiled_evaluation
from mmrep.checkpoints import write_checkpoint
from mmrep.cli import run_tool
from mmrep.deployment import build_model, deploy_config, export_onnx, read_config
from mmrep.hosts import forward
from mmrep.models.blocks import DiverseBranchBlock
from mmrep.quantization import Quantizer, Recipe, Session, prepared
from mmrep.reparam import branch_by_branch, compare_outputs

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / 'tests' / 'models' / 'blocks'))

from official_dbb import OfficialDBB  # noqa: E402

CONFIGS = {
    'RepVGG-A0': ROOT / 'configs/repvgg/repvgg-a0_8xb32_in1k.py',
    'RepVGG-B0': ROOT / 'configs/repvgg/repvgg-b0_8xb32_in1k.py',
    'RepVGG-B3': ROOT / 'configs/repvgg/repvgg-b3_8xb32_in1k.py',
    'DBB-ResNet-18': ROOT / 'configs/dbb/dbb-resnet18_8xb32_in1k.py',
    'DBB-ResNet-50': ROOT / 'configs/dbb/dbb-resnet50_8xb32_in1k.py',
    'OREPA-ResNet-18': ROOT / 'configs/blocks/orepa-resnet18_8xb32_in1k.py',
}


@dataclass
class Mark:
    """A promise, and what was measured.

    Args:
        task: What is measured.
        limit: The largest ratio allowed of the first figure to the second, or the largest
            value of the first if it is alone.
        figures: What was measured, by name.
        unit: Their unit. Default: ``'ms'``.
    """

    task: str
    limit: float
    figures: dict[str, float]
    unit: str = 'ms'

    @property
    def measured(self) -> float:
        first, *others = self.figures.values()
        return first / others[0] if others else first

    @property
    def row(self) -> tuple[str, ...]:
        """The mark as a row of :data:`HEAD`."""
        names = ' / '.join(list(self.figures)[:2])
        figures = ', '.join(f'{name} {value:.4g}' for name, value in self.figures.items())
        return (
            f'{self.task}: {names}',
            f'{self.limit:.2f}',
            f'{self.measured:.2f}',
            'yes' if self.measured <= self.limit else '**no**',
            f'{figures} {self.unit}'.rstrip(),
        )


HEAD = ('task', 'mark', 'measured', 'holds', 'figures')


def forms_of(name: str) -> dict[str, BenchmarkModel]:
    """The models of a config, by the package that they come from."""
    return {m.name: m for m in models_of(read_config(CONFIGS[name]))}


def images(batch: int, size: int) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def milliseconds(rounds: int, runs: dict[str, Run]) -> dict[str, float]:
    """Medians of functions that are timed in turns."""
    return {name: 1e3 * m.median for name, m in interleave(runs, rounds).items()}


def evaluate(rounds: int) -> Iterator[Mark]:
    """The train form in eval mode over the deploy form."""
    x = images(8, 224)
    for name, limit in (('RepVGG-A0', 1.15), ('DBB-ResNet-50', 1.30)):
        ours = forms_of(name)['mmrep']
        forms = {'train form': ours.train_form, 'deploy form': ours.deploy_form}
        runs = {form: evaluation(model, x) for form, model in forms.items()}
        yield Mark(f'evaluation, {name}', limit, milliseconds(rounds, runs))


def norm_eval(rounds: int) -> Iterator[Mark]:
    """Training steps with ``norm_eval``."""
    models, x = forms_of('RepVGG-A0'), images(8, 160)
    runs = {
        name: step(models[name].train_form, x, norm_eval=True)
        for name in ('mmrep', 'mmpretrain')
    }
    yield Mark('step with norm_eval, RepVGG-A0', 0.75, milliseconds(rounds, runs))


def train(rounds: int) -> Iterator[Mark]:
    """Ordinary training steps."""
    x = images(8, 160)
    ours = forms_of('DBB-ResNet-18')['mmrep'].train_form
    official = with_official_blocks(copy.deepcopy(ours))
    runs = {'mmrep': step(ours, x), 'official block': step(official, x)}
    yield Mark('step, DBB-ResNet-18', 0.95, milliseconds(rounds, runs))
    models = forms_of('RepVGG-A0')
    runs = {name: step(models[name].train_form, x) for name in ('mmrep', 'mmpretrain')}
    yield Mark('step, RepVGG-A0', 1.00, milliseconds(rounds, runs))


def orepa(rounds: int) -> Iterator[Mark]:
    """Training steps of the recipe's batch size; OREPA's kernels cost the same at any."""
    x = images(32, 160)
    runs = {
        name: step(build_model(read_config(CONFIGS[name])).train(), x)
        for name in ('OREPA-ResNet-18', 'DBB-ResNet-18')
    }
    yield Mark('step of 32 images', 0.60, milliseconds(max(3, rounds // 3), runs))


def with_official_blocks(model: nn.Module) -> nn.Module:
    """Replace every DBB by the official block with the same weights."""
    for name, child in model.named_children():
        if isinstance(child, DiverseBranchBlock):
            official = OfficialDBB(
                child.in_channels,
                child.out_channels,
                child.kernel_size,
                child.stride,
                child.dilation,
                child.groups,
            )
            official.load_state_dict(child.state_dict())
            setattr(model, name, nn.Sequential(official, child.act or nn.Identity()))
        else:
            with_official_blocks(child)
    return model


def compiled(rounds: int) -> Iterator[Mark]:
    """Ordinary training steps with ``torch.compile``, over those without.

    Inductor is kept from channels last: there, on a CPU, the weight gradient of the stem's
    strided 1x1 conv writes beyond its memory, and the process dies
    (https://github.com/uxlfoundation/oneDNN/issues/6035).
    """
    x, options = images(8, 160), {'layout_optimization': False}
    for name in ('RepVGG-A0', 'DBB-ResNet-18'):
        model = forms_of(name)['mmrep'].train_form
        program = torch.compile(model, options=options)
        runs = {'torch.compile': step(program, x), 'eager': step(model, x)}
        yield Mark(f'step, {name}', 0.90, milliseconds(rounds, runs))
        explained = torch._dynamo.explain(forward)(model, x)
        breaks = {'graph breaks': explained.graph_break_count}
        yield Mark(f'torch.compile, {name}', 0, breaks, unit='')


def memory(rounds: int) -> Iterator[Mark]:
    """What a checkpointed DBB keeps for the backward pass, its output not counted.

    It has to keep its input, which is one feature map, and a few KiB of running statistics
    and of the random generator's state.
    """
    x = torch.randn(8, 64, 56, 56, requires_grad=True)
    plain = DiverseBranchBlock(64, 64)
    sizes = {
        'with_cp=True': DiverseBranchBlock(64, 64, with_cp=True),
        'torch.utils.checkpoint': partial(checkpoint, plain, use_reentrant=False),
        'neither': plain,
    }
    kept = {n: kept_memory(lambda f=f: f(x.clone())) / 2**20 for n, f in sizes.items()}
    neither = kept.pop('neither')
    for name, size in kept.items():
        figures = {name: size, 'input': x.nbytes / 2**20, 'neither': neither}
        yield Mark('kept by a DBB', 1.1, figures, 'MiB')


def reparam(rounds: int) -> Iterator[Mark]:
    """Whole processes of the fusing tools; mmrep's includes the verification."""
    import mmpretrain

    theirs = Path(mmpretrain.__file__).parent / '.mim/tools/model_converters'
    with TemporaryDirectory() as folder:
        config = read_config(CONFIGS['RepVGG-B3'])
        weights = Path(folder, 'b3.pth')
        model = build_model(config)
        randomise_statistics(model)
        write_checkpoint(weights, model.state_dict(), {})
        del model
        config.model.backbone.type = 'RepVGG'
        config.dump(Path(folder, 'mmpretrain.py'))
        commands = {
            'mmrep': [
                ROOT / 'tools/reparam.py',
                CONFIGS['RepVGG-B3'],
                weights,
                f'{folder}/ours.pth',
                '--overwrite',
            ],
            'mmpretrain': [
                theirs / 'reparameterize_model.py',
                f'{folder}/mmpretrain.py',
                weights,
                f'{folder}/theirs.pth',
            ],
        }
        seconds, peaks = processes(max(3, rounds // 3), commands)
    yield Mark('tools/reparam.py, RepVGG-B3, wall time', 1.00, seconds, 's')
    yield Mark('tools/reparam.py, RepVGG-B3, peak RSS', 0.70, peaks, 'MiB')


def start(rounds: int) -> Iterator[Mark]:
    """Importing mmrep over importing the parts of the hosts that it is made of.

    ``import mmengine, mmcv`` alone, the last figure, loads no module to build models with.
    """
    imports = {
        'import mmrep': 'import mmrep',
        'mmengine.model, mmcv.cnn': 'import mmengine.model, mmcv.cnn',
        'mmengine, mmcv': 'import mmengine, mmcv',
    }
    commands = {name: ['-c', code] for name, code in imports.items()}
    yield Mark('start', 1.1, processes(rounds, commands)[0], 's')


#: Runs a program and prints its seconds and its peak KiB. This is a process in between,
#: because the peak of a process includes that of its parent, which is large here.
WATCH = """
import os, sys, time
start = time.perf_counter()
pid = os.posix_spawn(sys.executable, [sys.executable, *sys.argv[1:]], os.environ)
_, status, usage = os.wait4(pid, 0)
print()
print(time.perf_counter() - start, usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def processes(
    rounds: int, commands: dict[str, list[str | Path]]
) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds and median peak MiB of Python processes that run in turns.

    The first round, which may read from a cold disk, does not count.
    """
    runs = {name: [] for name in commands}
    for _ in range(1 + rounds):
        for name, command in commands.items():
            # Finish the writes of the process before.
            os.sync()
            runs[name].append(process(command))
    seconds, peaks = (
        {
            name: statistics.median(run[i] for run in rounds[1:])
            for name, rounds in runs.items()
        }
        for i in range(2)
    )
    return seconds, peaks


def process(command: list[str | Path]) -> tuple[float, float]:
    """Seconds and peak MiB of a Python process, which has to succeed."""
    process = subprocess.run(
        [sys.executable, '-c', WATCH, *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode:
        raise RuntimeError(process.stderr[-2000:])
    seconds, peak = map(float, process.stdout.splitlines()[-1].split())
    return seconds, peak / 1024


@torch.no_grad()
def error(rounds: int) -> Iterator[Mark]:
    """The error of fusing alone: relative L2 errors of outputs computed in float64.

    In float32 most of the error would be rounding in the two forward passes.
    """
    models, x = forms_of('RepVGG-A0'), images(2, 224).double()
    losses = {name: loss(models[name], x) for name in ('mmrep', 'mmpretrain')}
    yield Mark('what fusing loses, RepVGG-A0', 0.5, losses, unit='')


def loss(model: BenchmarkModel, x: Tensor) -> float:
    """The relative L2 error of the deploy form, computed in the input's dtype."""
    with branch_by_branch(model.train_form.to(x.dtype)) as train_form:
        reference = forward(train_form, x)
    (difference,) = compare_outputs(
        reference, forward(model.deploy_form.to(x.dtype), x)
    ).values()
    return difference.rel_l2


def int8(rounds: int) -> Iterator[Mark]:
    """Deploy forms in int8 over the fastest peer in fp32, for one image and for eight.

    On one thread, since torch's threads would still spin when those of ONNX Runtime start,
    which costs a run of milliseconds a third of its time.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield from int8_on_one_thread(rounds)
    finally:
        torch.set_num_threads(threads)


def int8_on_one_thread(rounds: int) -> Iterator[Mark]:
    """See :func:`int8`."""
    for name in ('RepVGG-A0', 'RepVGG-B0'):
        models = forms_of(name)
        ours = models.pop('mmrep')
        config = deploy_config(read_config(CONFIGS[name]))
        graphs = fp32_and_int8(config, ours.deploy_form)
        for batch in (1, 8):
            x = images(batch, 224)
            peers = {
                f'{peer}{how}': run(models[peer].deploy_form, x)
                for peer in models
                for how, run in (('', evaluation), (', torch.compile', compiled_evaluation))
            }
            sessions = {form: Session(graph) for form, graph in graphs.items()}
            runs = {f: partial(session, x.numpy()) for f, session in sessions.items()}
            figures = milliseconds(rounds, runs | peers)
            fastest = min(peers, key=figures.get)
            order = dict.fromkeys(['int8', fastest, *figures])
            figures = {name: figures[name] for name in order}
            yield Mark(f'one thread, {name}, batch {batch}', 0.30, figures)


def fp32_and_int8(config: Config, model: nn.Module) -> dict[str, ModelProto]:
    """The graphs of a deploy form, for batches of any size."""
    with TemporaryDirectory() as folder:
        checkpoint, path = Path(folder, 'deploy.pth'), Path(folder, 'fp32.onnx')
        write_checkpoint(checkpoint, model.state_dict(), {})
        export_onnx(config, checkpoint, path, dynamic=True)
        fp32 = prepared(path)
    quantizer = Quantizer(fp32, [images(1, 224).numpy()])
    return {'fp32': fp32, 'int8': quantizer.quantize(Recipe('minmax', per_channel=True))}


_GROUPS = evaluate, norm_eval, train, orepa, compiled, memory, reparam, start, error, int8
GROUPS = {function.__name__: function for function in _GROUPS}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument(
        '--groups', nargs='+', choices=GROUPS, default=list(GROUPS), help='default: all'
    )
    parser.add_argument(
        '--rounds', type=int, default=15, help='how often each is timed (default: 15)'
    )
    parser.add_argument(
        '--out',
        type=Path,
        help='write the figures to this .json and the table beside it as .md',
    )
    return parser.parse_args()


def machine() -> dict[str, str | int]:
    """The machine and the versions that the figures depend on."""
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.split(':')[1].strip() for line in lines if line.startswith('model name')]
    return dict(
        cpu=models[0] if models else platform.processor(),
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        torch=torch.__version__,
        date=time.strftime('%Y-%m-%d'),
    )


def markdown(marks: list[Mark], on: dict) -> str:
    """The table as a Markdown page."""
    rows = [HEAD, ['---'] * len(HEAD), *(mark.row for mark in marks)]
    table = '\n'.join(f'| {" | ".join(row)} |' for row in rows)
    where = ', '.join(f'{key} {value}' for key, value in on.items())
    return f'# Marks\n\n`make bench` on: {where}.\n\n{table}\n'


def main() -> None:
    args = parse_args()
    marks = []
    for group in args.groups:
        for mark in GROUPS[group](args.rounds):
            marks.append(mark)
            print(*mark.row, sep='; ', flush=True)
    table = Table(*HEAD)
    for mark in marks:
        table.add_row(*mark.row)
    Console().print(table)
    if args.out:
        on = machine()
        args.out.parent.mkdir(parents=True, exist_ok=True)
        figures = [dict(asdict(mark), measured=mark.measured) for mark in marks]
        args.out.write_text(json.dumps(dict(machine=on, marks=figures), indent=2) + '\n')
        args.out.with_suffix('.md').write_text(markdown(marks, on))


if __name__ == '__main__':
    run_tool(main)
