"""Measure models side by side."""

from .memory import kept_memory, peak_memory
from .plane import draw_plane, published_accuracy
from .run import WORKS, Benchmark, Timing, benchmark
from .subjects import Subject, randomise_statistics, subjects_of
from .timing import interleave
from .works import (
    Run,
    channels_last,
    compiled,
    compiled_step,
    evaluation,
    onnxruntime,
    step,
)

__all__ = [
    'WORKS',
    'Benchmark',
    'Run',
    'Subject',
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
    'subjects_of',
]
