"""Run ONNX graphs by ONNX Runtime, and measure how far their outputs differ."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mmrep.errors import UserError, reason

if TYPE_CHECKING:
    # Imported where they are needed: mmrep works without them.
    from onnx import ModelProto


class Session:
    """A graph with the input ``input``, ready to run on the CPU.

    Args:
        model: The graph.

    Raises:
        UserError: If ONNX Runtime cannot load it.
    """

    def __init__(self, model: 'ModelProto') -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self._session = onnxruntime.InferenceSession(
                model.SerializeToString(),
                options,
                providers=['CPUExecutionProvider'],
            )
        except Exception as error:
            # It may raise anything.
            raise UserError(
                f'ONNX Runtime cannot load the graph ({reason(error)}): leave layers out '
                'by --exclude'
            ) from error
        (self._input,) = self._session.get_inputs()
        self.outputs = [value.name for value in self._session.get_outputs()]

    def __call__(self, images: np.ndarray) -> list[np.ndarray]:
        """The outputs for images ``(N, C, H, W)``.

        A graph with a batch of one gets them one by one.

        Raises:
            UserError: If they are not of the size that the graph takes.
        """
        batches = [images]
        if self._input.shape[0] == 1:
            batches = np.split(images, len(images))
        try:
            results = [self._session.run(None, {'input': batch}) for batch in batches]
        except Exception as error:
            raise UserError(
                f'the graph takes inputs of shape {tuple(self._input.shape)}, and the data '
                f'set has one of {images.shape} ({reason(error)}): give a fitting --shape, '
                'or --dynamic'
            ) from error
        return [np.concatenate(parts) for parts in zip(*results, strict=True)]

    def infer(self, images: Tensor) -> Tensor:
        """The first output for images, as a tensor."""
        return torch.from_numpy(self(images.numpy())[0])


@dataclass
class Error:
    """How far an output is from its reference, over many images.

    Args:
        signal: Sum of the squares of the reference.
        noise: Sum of the squares of the difference.
        positions: Number of positions in all axes but the channels'.
        agreeing: Number of these positions that have the same largest channel.
    """

    signal: float = 0.0
    noise: float = 0.0
    positions: int = 0
    agreeing: int = 0

    def add(self, reference: np.ndarray, output: np.ndarray) -> None:
        """Take another batch ``(N, C, ...)`` into account."""
        reference, output = reference.astype(float), output.astype(float)
        self.signal += float((reference**2).sum())
        self.noise += float(((output - reference) ** 2).sum())
        axis = min(1, reference.ndim - 1)
        agree = reference.argmax(axis) == output.argmax(axis)
        self.positions += agree.size
        self.agreeing += int(agree.sum())

    @property
    def sqnr(self) -> float:
        """``10 log10(signal / noise)`` in dB; infinite where nothing differs."""
        if not self.noise:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf

    @property
    def agreement(self) -> float:
        """The share of positions with the same largest channel."""
        return self.agreeing / self.positions if self.positions else 1.0


def errors(
    references: Sequence[Sequence[np.ndarray]],
    session: Session,
    images: Sequence[np.ndarray],
) -> list[Error]:
    """How far each output of a graph is from its references on the same images."""
    found = [Error() for _ in session.outputs]
    for reference, image in zip(references, images, strict=True):
        for error, expected, output in zip(found, reference, session(image), strict=True):
            error.add(expected, output)
    return found


def total_sqnr(found: Sequence[Error]) -> float:
    """The SQNR in dB of all outputs together, with equal weights."""
    ratios = [e.noise / e.signal if e.noise and e.signal else e.noise for e in found]
    ratio = sum(ratios) / len(ratios)
    return -10 * math.log10(ratio) if ratio else math.inf
