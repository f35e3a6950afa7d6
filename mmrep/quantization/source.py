"""Prepare a checkpoint to be quantized: its graph, its images and its evaluation."""

import copy
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from mmengine.config import Config
from torch import nn

from mmrep.deployment import Shape, build_model, export_onnx, input_shape
from mmrep.errors import UserError

from .calibration import build_dataset, calibration_dataset, calibration_images
from .evaluation import HostEvaluation, has_one_head
from .judging import MetricJudge, OutputJudge
from .progress import Track
from .quantizer import prepared
from .search import COMPARED
from .sessions import Session

if TYPE_CHECKING:
    # Imported where they are needed: mmrep works without them.
    from onnx import ModelProto


@dataclass
class Source:
    """A checkpoint that is to be quantized.

    Args:
        graph: Its deploy form in fp32, verified and prepared.
        said: The record of its origin in the exported file.
        images: Calibration images, ``(1, C, H, W)`` each.
        evaluation: How the host evaluates it; None if raw outputs decide.
    """

    graph: 'ModelProto'
    said: dict
    images: list[np.ndarray]
    evaluation: HostEvaluation | None

    def judge(self, track: Track) -> MetricJudge | OutputJudge:
        """The judge of what quantized graphs lose against the graph as it is now."""
        if self.evaluation is None:
            return OutputJudge(self.images[:COMPARED], self.graph)
        return MetricJudge(self.evaluation, self.graph, track)


def load_source(
    config: Config,
    checkpoint: str | Path,
    metric: str | None,
    samples: int,
    track: Track,
    **export: Any,
) -> Source:
    """Export a checkpoint in fp32 and read its calibration images.

    Args:
        config: The config.
        checkpoint: The checkpoint.
        metric: See :class:`HostEvaluation`.
        samples: The largest number of calibration images.
        track: Wraps what takes long, with a title, to show progress.
        **export: See :func:`~mmrep.deployment.export_onnx`.

    Raises:
        UserError: With one sentence, if anything is wrong.
    """
    model = build_model(_as_run(config))
    export['shape'] = export.get('shape') or _shape(config)
    evaluation = _evaluation(config, model, metric, (1, *export['shape']))
    dataset = build_dataset(calibration_dataset(config))
    with TemporaryDirectory() as folder:
        path = Path(folder, 'fp32.onnx')
        export_onnx(config, checkpoint, path, **export)
        graph, said = prepared(path), _said_of(path)
    inputs_of = partial(_preprocessed, model)
    if evaluation is not None:
        inputs_of = partial(evaluation.inputs_of, infer=Session(graph).infer)
    images = calibration_images(dataset, inputs_of, samples, track)
    return Source(graph, said, images, evaluation)


def _as_run(config: Config) -> Config:
    """A config whose model has the data preprocessor that a Runner gives it."""
    config = copy.deepcopy(config)
    if config.get('data_preprocessor') is not None:
        config.model.setdefault('data_preprocessor', config.data_preprocessor)
    return config


def _preprocessed(model: nn.Module, data: dict) -> list[np.ndarray]:
    """A batch of one image as the model's data preprocessor gives it."""
    return [model.data_preprocessor(data, False)['inputs'].numpy()]


def _shape(config: Config) -> Shape:
    """Channels, height and width of the network's input; in ``slide`` mode, of a crop."""
    shape, test = input_shape(config), config.model.get('test_cfg')
    if isinstance(test, dict) and test.get('mode') == 'slide':
        shape = (shape[0], *test['crop_size'])
    return shape


def _evaluation(
    config: Config, model: nn.Module, metric: str | None, shape: tuple[int, ...]
) -> HostEvaluation | None:
    """How the host evaluates the model; None for one that is judged by raw outputs.

    Raises:
        UserError: If a metric is given for a model that is judged by its raw outputs.
    """
    if has_one_head(model, shape):
        return HostEvaluation(config, model, metric)
    if metric is not None:
        raise UserError(
            f'{type(model).__name__} is judged by its raw outputs, since these are not one '
            'tensor from one head: leave --metric out'
        )
    return None


def _said_of(path: Path) -> dict:
    """The record of its origin in an exported file."""
    import onnx

    properties = onnx.load(path, load_external_data=False).metadata_props
    return next(json.loads(entry.value) for entry in properties if entry.key == 'mmrep')
