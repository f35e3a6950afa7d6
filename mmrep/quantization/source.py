"""What a checkpoint gives to be quantized: its graph, images, and how it is evaluated."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from mmengine.config import Config
from torch import nn

from mmrep.deployment import build_model, export_onnx
from mmrep.errors import UserError

from .calibration import build_dataset, calibration_dataset, calibration_images
from .evaluation import HostEvaluation, has_one_head
from .judging import MetricJudge, OutputJudge
from .progress import Track
from .quantizer import prepared

if TYPE_CHECKING:
    # Imported where they are needed: mmrep works without them.
    from onnx import ModelProto


@dataclass
class Source:
    """A checkpoint that is to be quantized.

    Args:
        graph: Its deploy form in fp32, verified and prepared.
        size: Bytes of the exported file.
        said: What the file says of where it comes from.
        images: Calibration images, ``(1, C, H, W)`` each.
        evaluation: How the host evaluates it; None where raw outputs decide.
    """

    graph: 'ModelProto'
    size: int
    said: dict
    images: list[np.ndarray]
    evaluation: HostEvaluation | None

    def judge(self, track: Track) -> MetricJudge | OutputJudge:
        """What says how much a quantized graph loses against the graph as it is now."""
        if self.evaluation is None:
            return OutputJudge(self.images, self.graph)
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
        samples: The most calibration images.
        track: Wraps what takes long, with a title.
        **export: See :func:`~mmrep.deployment.export_onnx`.

    Raises:
        UserError: With one sentence, if anything is wrong.
    """
    model = build_model(_as_run(config))
    evaluation = _evaluation(config, model, metric)
    dataset = build_dataset(calibration_dataset(config))
    with TemporaryDirectory() as folder:
        path = Path(folder, 'fp32.onnx')
        export_onnx(config, checkpoint, path, **export)
        graph, size, said = prepared(path), path.stat().st_size, _said_of(path)
    images = calibration_images(dataset, model, samples, track)
    return Source(graph, size, said, images, evaluation)


def _as_run(config: Config) -> Config:
    """A config whose model has the data preprocessor that a Runner gives it."""
    config = copy.deepcopy(config)
    config.model.setdefault('data_preprocessor', config.get('data_preprocessor'))
    return config


def _evaluation(
    config: Config, model: nn.Module, metric: str | None
) -> HostEvaluation | None:
    """How the host evaluates the model; None for one that is judged by raw outputs.

    Raises:
        UserError: If a metric is asked of such a one.
    """
    if has_one_head(model):
        return HostEvaluation(config, model, metric)
    if metric is not None:
        raise UserError(
            f'{type(model).__name__} is judged by its raw outputs, since its predictions '
            'are not made by one head of a classifier or a segmentor: leave --metric out'
        )
    return None


def _said_of(path: Path) -> dict:
    """What an exported file says of where it comes from."""
    import onnx

    properties = onnx.load(path, load_external_data=False).metadata_props
    return next(json.loads(entry.value) for entry in properties if entry.key == 'mmrep')
