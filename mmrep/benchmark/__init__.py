"""Measure models side by side."""

from .memory import kept_memory, peak_memory
from .plane import draw_plane, published_accuracy
from .run import TASKS, Benchmark, Timing, benchmark
from .models import BenchmarkModel, randomise_statistics, models_of
from .timing import interleave
from .tasks import (
    Run,
    channels_last,
    compiled,
    compiled_step,
    evaluation,
    onnxruntime,
    step,
)

__all__ = [
    'TASKS',
    'Benchmark',
    'Run',
    'BenchmarkModel',
    'Timing',
    'benchmark',
    'channels_last',
    'compiled',
    'compiled_step',
    'draw_plane',
    'evaluation',
    'interleave',
    'kept_memory',
    'onnxruntime',
    'peak_memory',
    'published_accuracy',
    'randomise_statistics',
    'step',
    'models_of',
]
