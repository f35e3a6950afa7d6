"""Benchmark a config."""

import copy
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from mmengine.analysis import FlopAnalyzer
from mmengine.config import Config
from torch import Tensor, nn

from mmrep.deployment import Shape, deploy_config, input_shape
from mmrep.deployment.running import run_form, seeded_input
from mmrep.reparam import branch_by_branch, count_parameters

from .memory import peak_memory
from .models import BenchmarkModel, models_of
from .tasks import (
    Run,
    channels_last,
    compiled,
    compiled_step,
    evaluation,
    onnxruntime,
    step,
)
from .timing import interleave

#: What can be measured.
TASKS = ('train', 'norm_eval', 'eval', 'deploy')


@dataclass
class Timing:
    """How long a task took.

    Args:
        task: One of ``TASKS``.
        name: Name of the model, with its form or runtime if there are several.
        median: Seconds.
        iqr: Distance between the quartiles, in seconds.
        peak: The most bytes of tensors held at once, or ``None`` if not measured.
    """

    task: str
    name: str
    median: float
    iqr: float
    peak: int | None = None


@dataclass
class Benchmark:
    """What :func:`benchmark` measured.

    Args:
        config: Name of the config.
        device: Name of the device.
        dtype: ``'float32'``, or ``'bfloat16'`` under autocast.
        shape: Batch, channels, height and width.
        timings: The times.
        sizes: Parameters and FLOPs (multiply-adds for one image) of each form.
    """

    config: str
    device: str
    dtype: str
    shape: tuple[int, ...]
    timings: list[Timing] = field(default_factory=list)
    sizes: dict[str, dict[str, int]] = field(default_factory=dict)


def benchmark(
    config: Config,
    name: str,
    batch_size: int = 8,
    shape: Shape | None = None,
    device: str = 'cpu',
    amp: bool = False,
    tasks: tuple[str, ...] = TASKS,
    rounds: int = 15,
    compile_model: bool = True,
) -> Benchmark:
    """Measure the model of a config, in turns with its peers.

    Args:
        config: The config.
        name: Its name, for the record.
        batch_size: Images in a batch. Default: 8.
        shape: Channels, height and width. Default: the config's.
        device: ``'cpu'`` or a CUDA device. Default: ``'cpu'``.
        amp: Whether to compute in bfloat16 where autocast does. Default: False.
        tasks: What to measure, of ``TASKS``. Default: all.
        rounds: How often each is timed. Default: 15.
        compile_model: Whether to measure training steps and the deploy form also with
            ``torch.compile``, which takes a minute to compile each. Default: True.
    """
    # Otherwise the compiler silently gives up after many configs in a row.
    torch.compiler.reset()
    shape = shape or input_shape(config)
    models = models_of(config, device)
    x = seeded_input((batch_size, *shape), seed=0).to(device)
    # An input that does not fit fails here, not after minutes of measuring.
    run_form(models[0].train_form, x[:1], 'train')
    dtype = 'bfloat16' if amp else 'float32'
    result = Benchmark(name, _device_name(device), dtype, tuple(x.shape))
    for model in models:
        result.sizes[f'{model.name}, train form'] = _sizes(model.train_form, x)
        if model.deploy_form is not model.train_form:
            result.sizes[f'{model.name}, deploy form'] = _sizes(model.deploy_form, x)
    train_forms = {model.name: model.train_form for model in models}
    for task in ('train', 'norm_eval'):
        if task in tasks:
            norm_eval = task == 'norm_eval'
            runs = {n: step(m, x, norm_eval, amp) for n, m in train_forms.items()}
            if compile_model and not norm_eval:
                runs |= {
                    f'{n}, torch.compile': compiled_step(m, x, amp)
                    for n, m in train_forms.items()
                }
            result.timings += _time(task, runs, rounds, device)
    if 'eval' in tasks:
        runs = {n: evaluation(m, x, amp) for n, m in train_forms.items()}
        runs['mmrep, deploy form'] = evaluation(models[0].deploy_form, x, amp)
        result.timings += _time('eval', runs, rounds, device)
    if 'deploy' in tasks:
        runs = _deploy_runs(models, config, x, amp, compile_model)
        result.timings += _time('deploy', runs, rounds)
    return result


def _deploy_runs(
    models: list[BenchmarkModel], config: Config, x: Tensor, amp: bool, compile_model: bool
) -> Mapping[str, Run]:
    runs = {m.name: evaluation(m.deploy_form, x, amp) for m in models}
    model = models[0].deploy_form
    runs['mmrep, channels_last'] = channels_last(copy.deepcopy(model), x, amp)
    if compile_model:
        runs['mmrep, torch.compile'] = compiled(model, x, amp)
    if x.device.type == 'cpu' and not amp and importlib.util.find_spec('onnxruntime'):
        runs['mmrep, ONNX Runtime'] = onnxruntime(model, x, deploy_config(config))
    return runs


def _time(
    task: str, runs: Mapping[str, Run], rounds: int, device: str | None = None
) -> list[Timing]:
    """Time runs; measure their memory on ``device`` if one is given."""
    timings = []
    for name, measured in interleave(runs, rounds).items():
        peak = peak_memory(runs[name], device) if device else None
        timings.append(Timing(task, name, measured.median, measured.iqr, peak))
    return timings


def _sizes(model: nn.Module, x: Tensor) -> dict[str, int]:
    # For one image, with every branch; warnings about operators without FLOPs are off.
    with branch_by_branch(model):
        flops = FlopAnalyzer(model, x[:1])
        flops.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        return dict(parameters=count_parameters(model), flops=int(flops.total()))


def _device_name(device: str) -> str:
    if torch.device(device).type == 'cuda':
        return torch.cuda.get_device_name(device)
    return f'CPU, {torch.get_num_threads()} threads'
