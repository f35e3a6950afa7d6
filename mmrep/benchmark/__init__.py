"""Measure models side by side."""

from .memory import kept_memory, peak_memory
from .models import BenchmarkModel, models_of, randomise_statistics
from .plane import draw_plane, published_accuracy
from .run import TASKS, Benchmark, Timing, benchmark
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

__all__ = [
    'TASKS',
    'Benchmark',
    'BenchmarkModel',
    'Run',
    'Timing',
    'benchmark',
    'channels_last',
    'compiled',
    'compiled_step',
    'draw_plane',
    'evaluation',
    'interleave',
    'kept_memory',
    'models_of',
    'onnxruntime',
    'peak_memory',
    'published_accuracy',
    'randomise_statistics',
    'step',
]
