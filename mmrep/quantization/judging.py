"""Measure what int8 costs, by the host's metric or by the raw outputs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mmrep.errors import UserError

from .evaluation import HostEvaluation
from .progress import Track
from .sessions import Error, Session, errors

if TYPE_CHECKING:
    # Imported where they are needed: mmrep works without them.
    from onnx import ModelProto


@dataclass(frozen=True)
class Judgement:
    """What was measured of a quantized graph.

    Args:
        outputs: How far each raw output is from that of the fp32 graph.
        metrics: The metrics on the validation set; empty if raw outputs decide.
        drop: The loss of the metric; 0 if raw outputs decide.
    """

    outputs: dict[str, Error]
    metrics: dict[str, float]
    drop: float


class MetricJudge:
    """Evaluates graphs as the host does, on the validation set.

    Args:
        evaluation: The evaluation by the host.
        fp32: The graph that the others are compared with.
        track: Wraps the batches, with a title, to show progress.

    Raises:
        UserError: If there is no such metric, or that of the fp32 graph is not a number.
    """

    def __init__(
        self, evaluation: HostEvaluation, fp32: 'ModelProto', track: Track
    ) -> None:
        self._evaluation = evaluation
        self._fp32 = Session(fp32)
        self._track = track
        #: The metrics of the fp32 graph, and the name of the one that decides.
        self.reference = evaluation.measure(self._fp32.infer, 'fp32', track)
        self.metric = evaluation.metric_of(self.reference)
        if math.isnan(self.reference[self.metric]):
            raise UserError(
                f'{self.metric} of the fp32 model is not a number: look at the validation '
                'set, or choose another --metric'
            )

    def __call__(self, int8: 'ModelProto') -> Judgement:
        """Judge a quantized graph."""
        session = Session(int8)
        outputs = {name: Error() for name in session.outputs}

        def infer(images: Tensor) -> Tensor:
            references, found = self._fp32(images.numpy()), session(images.numpy())
            for error, reference, output in zip(
                outputs.values(), references, found, strict=True
            ):
                error.add(reference, output)
            return torch.from_numpy(found[0])

        metrics = self._evaluation.measure(infer, 'int8', self._track)
        drop = self.reference[self.metric] - metrics[self.metric]
        if self._evaluation.less_is_better(self.metric):
            drop = -drop
        return Judgement(outputs, metrics, math.inf if math.isnan(drop) else drop)


class OutputJudge:
    """Compares the raw outputs of graphs on images.

    Args:
        images: The images.
        fp32: The graph that the others are compared with.
    """

    reference, metric = {}, None

    def __init__(self, images: Sequence[np.ndarray], fp32: 'ModelProto') -> None:
        session = Session(fp32)
        self._images = images
        self._references = [session(image) for image in images]

    def __call__(self, int8: 'ModelProto') -> Judgement:
        """Judge a quantized graph."""
        session = Session(int8)
        found = errors(self._references, session, self._images)
        return Judgement(dict(zip(session.outputs, found, strict=True)), {}, 0.0)
