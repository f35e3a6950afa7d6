"""Measure what mmrep promises of its speed, side by side with the alternatives.

    make bench

Each line is a ratio of medians that were taken in turns in one process, or of whole
processes in turns. What the alternatives are stands in the table.
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
from pathlib import Path
from tempfile import TemporaryDirectory

# Before torch comes: its profiler would report on standard error what it does not find.
os.environ.setdefault('KINETO_LOG_LEVEL', '99')

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from mmrep.benchmark import (
    Run,
    Subject,
    channels_last,
    compiled,
    evaluation,
    interleave,
    onnxruntime,
    peak_memory,
    randomise_statistics,
    step,
    subjects_of,
)
from mmrep.checkpoints import write_checkpoint
from mmrep.cli import run_tool
from mmrep.deployment import build_model, deploy_config, forward, read_config
from mmrep.models.blocks import DiverseBranchBlock
from mmrep.reparam import branch_by_branch, compare_outputs

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / 'tests' / 'models' / 'blocks'))

from official_dbb import OfficialDBB  # noqa: E402

CONFIGS = {
    'RepVGG-A0': ROOT / 'configs/repvgg/repvgg-a0_8xb32_in1k.py',
    'RepVGG-B3': ROOT / 'configs/repvgg/repvgg-b3_8xb32_in1k.py',
    'DBB-ResNet-18': ROOT / 'configs/dbb/dbb-resnet18_8xb32_in1k.py',
    'DBB-ResNet-50': ROOT / 'configs/dbb/dbb-resnet50_8xb32_in1k.py',
}


@dataclass
class Mark:
    """A promise, and what was measured.

    Args:
        group: The option of this script that measures it.
        work: What is compared with what.
        limit: The most that it may be.
        measured: What it is.
        note: The figures behind it.
    """

    group: str
    work: str
    limit: float
    measured: float
    note: str = ''

    @property
    def holds(self) -> bool:
        return self.measured <= self.limit


def subjects(name: str) -> dict[str, Subject]:
    """The models of a config by where they come from."""
    return {s.name: s for s in subjects_of(read_config(CONFIGS[name]))}


def images(batch: int, size: int) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


class Turns:
    """Functions timed in turns, and then profiled."""

    def __init__(self, rounds: int, **functions: Run) -> None:
        measured = interleave(functions, rounds)
        self.medians = {name: 1e3 * m.median for name, m in measured.items()}
        self.conv_shares = {name: conv_share(run) for name, run in functions.items()}

    def ratio(self, name: str, *others: str) -> float:
        """Of one to the fastest of the others."""
        return self.medians[name] / min(self.medians[other] for other in others)

    def __str__(self) -> str:
        return ', '.join(
            f'{name} {ms:.0f}' + (f' (convs {share * ms:.0f})' if share else '')
            for (name, ms), share in zip(
                self.medians.items(), self.conv_shares.values(), strict=True
            )
        )


def conv_share(run: Run) -> float:
    """The share of the convs, forward and backward, in the time that operators take.

    What is in a line of the table besides them is all that there is to save.
    """
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run()
    times = {e.key: e.self_cpu_time_total for e in profiled.key_averages()}
    convs = sum(time for key, time in times.items() if 'convolution' in key)
    # ONNX Runtime has none of the operators that torch sees.
    return convs / (sum(times.values()) or 1)


def evaluate(rounds: int) -> Iterator[Mark]:
    """The train form in eval mode over the deploy form."""
    for name, limit in (('RepVGG-A0', 1.10), ('DBB-ResNet-50', 1.25)):
        models, x = subjects(name), images(8, 224)
        ours = models['mmrep']
        turns = Turns(
            rounds,
            train_form=evaluation(ours.train_form, x),
            deploy_form=evaluation(ours.deploy_form, x),
            **{n: evaluation(m.train_form, x) for n, m in models.items() if n != 'mmrep'},
        )
        work = f'evaluation, {name}: train form / deploy form'
        yield Mark(
            'evaluate', work, limit, turns.ratio('train_form', 'deploy_form'), str(turns)
        )


def norm_eval(rounds: int) -> Iterator[Mark]:
    """Steps with fixed statistics."""
    x = images(8, 160)
    for name, peer, limit in (
        ('RepVGG-A0', 'mmpretrain', 0.70),
        ('DBB-ResNet-18', 'plain', 1.3),
    ):
        models = subjects(name)
        turns = Turns(
            rounds,
            mmrep=step(models['mmrep'].train_form, x, norm_eval=True),
            **{peer: step(models[peer].train_form, x, norm_eval=True)},
        )
        work = f'step with norm_eval, {name}: mmrep / {peer}'
        yield Mark('norm_eval', work, limit, turns.ratio('mmrep', peer), str(turns))


def train(rounds: int) -> Iterator[Mark]:
    """Ordinary steps, and what they keep for the backward pass."""
    x = images(8, 160)
    models = subjects('DBB-ResNet-18')
    ours = models['mmrep'].train_form
    official = with_official_blocks(copy.deepcopy(ours))
    turns = Turns(
        rounds,
        mmrep=step(ours, x),
        official=step(official, x),
        plain=step(models['plain'].train_form, x),
    )
    work = 'step, DBB-ResNet-18: {} / official block'
    yield Mark(
        'train', work.format('mmrep'), 0.80, turns.ratio('mmrep', 'official'), str(turns)
    )
    kept = [
        peak_memory(lambda model=model: forward(model, x)) for model in (ours, official)
    ]
    yield Mark(
        'train',
        'activations kept, DBB-ResNet-18: mmrep / official block',
        0.75,
        kept[0] / kept[1],
        ', '.join(f'{size / 2**20:.0f} MiB' for size in kept),
    )
    models = subjects('RepVGG-A0')
    ours = models['mmrep'].train_form
    turns = Turns(
        rounds,
        mmrep=step(ours, x),
        mmpretrain=step(models['mmpretrain'].train_form, x),
    )
    work = 'step, RepVGG-A0: {} / mmpretrain'
    yield Mark(
        'train', work.format('mmrep'), 0.95, turns.ratio('mmrep', 'mmpretrain'), str(turns)
    )


class OfficialUnit(nn.Module):
    """The official block with the activation that ours has, and its weights."""

    def __init__(self, block: DiverseBranchBlock) -> None:
        super().__init__()
        self.block = OfficialDBB(
            block.in_channels,
            block.out_channels,
            block.kernel_size,
            block.stride,
            block.dilation,
            block.groups,
        )
        self.block.load_state_dict(block.state_dict())
        self.act = nn.Identity() if block.act is None else nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.block(x))


def with_official_blocks(model: nn.Module) -> nn.Module:
    """The same network of the plain re-implementation of the official block."""
    for name, child in model.named_children():
        if isinstance(child, DiverseBranchBlock):
            setattr(model, name, OfficialUnit(child))
        else:
            with_official_blocks(child)
    return model


def deploy(rounds: int) -> Iterator[Mark]:
    """Latency of the deploy form."""
    config = read_config(CONFIGS['RepVGG-A0'])
    models = subjects('RepVGG-A0')
    for batch in (1, 8):
        x = images(batch, 224)
        ours = models['mmrep'].deploy_form
        turns = Turns(
            2 * rounds,
            mmrep=evaluation(ours, x),
            channels_last=channels_last(copy.deepcopy(ours), x),
            torch_compile=compiled(ours, x),
            onnxruntime=onnxruntime(ours, x, deploy_config(config)),
            mmpretrain=evaluation(models['mmpretrain'].deploy_form, x),
            timm=evaluation(models['timm'].deploy_form, x),
        )
        peers = ('mmpretrain', 'timm')
        forms = ('mmrep', 'channels_last', 'torch_compile', 'onnxruntime')
        best = min(forms, key=turns.medians.get)
        work = f'latency, RepVGG-A0 deployed, batch {batch}: {{}} / {{}}'
        for peer in peers:
            yield Mark(
                'deploy',
                work.format('mmrep', peer),
                1.00,
                turns.ratio('mmrep', peer),
                str(turns) if peer == peers[0] else '',
            )
        yield Mark(
            'deploy', work.format(best, 'fastest peer'), 0.85, turns.ratio(best, *peers)
        )


def convert(rounds: int) -> Iterator[Mark]:
    """Whole processes of the converters, mmrep's with its verification."""
    import mmpretrain

    theirs = Path(mmpretrain.__file__).parent / '.mim/tools/model_converters'
    with TemporaryDirectory() as folder:
        config = read_config(CONFIGS['RepVGG-B3'])
        checkpoint = Path(folder, 'b3.pth')
        model = build_model(config)
        randomise_statistics(model)
        write_checkpoint(checkpoint, model.state_dict(), {})
        del model
        config.model.backbone.type = 'RepVGG'
        config.dump(Path(folder, 'mmpretrain.py'))
        commands = {
            'mmrep': [
                ROOT / 'tools/reparam.py',
                CONFIGS['RepVGG-B3'],
                checkpoint,
                f'{folder}/ours.pth',
                '--overwrite',
            ],
            'mmpretrain': [
                theirs / 'reparameterize_model.py',
                f'{folder}/mmpretrain.py',
                checkpoint,
                f'{folder}/theirs.pth',
            ],
        }
        figures = {name: [] for name in commands}
        for _ in range(max(3, rounds // 3)):
            for name, command in commands.items():
                # The disk may still write what the one before has left.
                os.sync()
                figures[name].append(process(list(map(str, command))))
    walls, peaks = (
        {n: statistics.median(f[i] for f in runs) for n, runs in figures.items()}
        for i in range(2)
    )
    for what, values, limit, unit in (
        ('wall time', walls, 1.0, 's'),
        ('peak RSS', peaks, 0.6, 'MiB'),
    ):
        yield Mark(
            'convert',
            f'reparam.py, RepVGG-B3, {what}: mmrep / mmpretrain',
            limit,
            values['mmrep'] / values['mmpretrain'],
            ', '.join(f'{name} {value:.4g} {unit}' for name, value in values.items()),
        )


#: Runs a program and prints its seconds and its peak KiB. It stands in between because a
#: process's peak includes that of the one that started it, which is large here.
WATCH = """
import os, sys, time
start = time.perf_counter()
pid = os.posix_spawn(sys.executable, [sys.executable, *sys.argv[1:]], os.environ)
_, status, usage = os.wait4(pid, 0)
print()
print(time.perf_counter() - start, usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def process(command: list[str]) -> tuple[float, float]:
    """Seconds and peak MiB of a Python process, which has to end well."""
    done = subprocess.run(
        [sys.executable, '-c', WATCH, *command],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    seconds, peak = map(float, done.stdout.splitlines()[-1].split())
    return seconds, peak / 1024


@torch.no_grad()
def error(rounds: int) -> Iterator[Mark]:
    """How far the deploy form is from the train form.

    In float32 that is mostly how the two forwards round. What fusing itself lost, and the
    deploy form will not get back, is seen when both are computed in float64.
    """
    for name in ('RepVGG-A0', 'RepVGG-B3', 'DBB-ResNet-50'):
        models = subjects(name)
        models = {n: m for n, m in models.items() if n in ('mmrep', 'mmpretrain')}
        for dtype, what in (
            (torch.float32, f'relative L2 error, {name}, float32'),
            (torch.float64, f'relative L2 error of fusing alone, {name}'),
        ):
            x = images(2, 224).to(dtype)
            errors = {n: distance(model, x) for n, model in models.items()}
            note = ', '.join(f'{source} {value:.1e}' for source, value in errors.items())
            yield Mark('error', what, 1e-6, errors['mmrep'], note)
            if 'mmpretrain' in errors:
                ratio = errors['mmrep'] / errors['mmpretrain']
                yield Mark('error', f'{what}: mmrep / mmpretrain', 0.5, ratio)


def distance(subject: Subject, x: Tensor) -> float:
    """The largest relative L2 error of the deploy form, computed in the input's dtype."""
    train_form, deploy_form = (
        form.to(x.dtype) for form in (subject.train_form, subject.deploy_form)
    )
    with branch_by_branch(train_form):
        reference = forward(train_form, x)
    differences = compare_outputs(reference, forward(deploy_form, x))
    return max(difference.rel_l2 for difference in differences.values())


GROUPS = {
    function.__name__: function
    for function in (evaluate, norm_eval, train, deploy, convert, error)
}


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
    """What the figures depend on."""
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
    """The table as a file."""
    rows = [
        f'| {m.work} | {m.limit:.3g} | {m.measured:.3g} | {"yes" if m.holds else "**no**"} '
        f'| {m.note} |'
        for m in marks
    ]
    head = '| work | mark | measured | holds | medians, ms |\n|---|---|---|---|---|'
    where = ', '.join(f'{key} {value}' for key, value in on.items())
    return f'# Marks\n\n`make bench` on: {where}.\n\n{head}\n' + '\n'.join(rows) + '\n'


def main() -> None:
    args = parse_args()
    marks = []
    console = Console()
    for group in args.groups:
        for mark in GROUPS[group](args.rounds):
            marks.append(mark)
            console.print(f'{mark.work}: {mark.measured:.3g} (mark {mark.limit:g})')
    table = Table('work', 'mark', 'measured', 'holds', 'medians, ms')
    for mark in marks:
        holds = '[green]yes' if mark.holds else '[red]no'
        table.add_row(
            mark.work, f'{mark.limit:.3g}', f'{mark.measured:.3g}', holds, mark.note
        )
    console.print(table)
    if args.out:
        on = machine()
        args.out.parent.mkdir(parents=True, exist_ok=True)
        figures = dict(machine=on, marks=[dict(asdict(m), holds=m.holds) for m in marks])
        args.out.write_text(json.dumps(figures, indent=2) + '\n')
        args.out.with_suffix('.md').write_text(markdown(marks, on))


if __name__ == '__main__':
    run_tool(main)
