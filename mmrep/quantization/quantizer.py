"""Quantize an ONNX graph to int8 by ONNX Runtime, calibrating once for each method."""

import io
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mmrep.errors import UserError, reason

from .progress import Track, untracked

if TYPE_CHECKING:
    # Imported where they are needed: mmrep works without them.
    from onnx import ModelProto, NodeProto, TensorProto

#: How the range of an activation is found.
METHODS = ('minmax', 'percentile')

#: Of the values of an activation, the share that its range holds, for ``'percentile'``.
PERCENTILE = 99.99

_AS_FP32 = 'export it in fp32 by tools/export_onnx.py, or report the config'

#: Operators with weights: the layers.
_WEIGHTED = ('Conv', 'ConvTranspose', 'Gemm', 'MatMul')


class Recipe(NamedTuple):
    """How a graph is quantized.

    Args:
        method: One of ``METHODS``.
        per_channel: Whether each output channel of a weight has its own scale.
    """

    method: str
    per_channel: bool

    def __str__(self) -> str:
        return f'{self.method}, per {"channel" if self.per_channel else "tensor"}'


class Quantizer:
    """A fused graph in fp32, which can be quantized in several ways.

    Activations become uint8 and weights int8, as ``QuantizeLinear`` and
    ``DequantizeLinear`` around each operator (QDQ).

    Args:
        model: The graph.
        images: What it is calibrated with, ``(1, C, H, W)`` each.
        reduce_range: Whether weights get 7 bits, for CPUs without VNNI, whose sums of
            products overflow with 8. Default: False.
        track: Wraps the images while they are calibrated with, with a title. Default:
            nothing.

    Raises:
        UserError: If nothing in the graph can be quantized.
    """

    def __init__(
        self,
        model: 'ModelProto',
        images: Sequence[np.ndarray],
        reduce_range: bool = False,
        track: Track = untracked,
    ) -> None:
        self.images = images
        self.reduce_range = reduce_range
        self._track = track
        self.model = model
        self._nodes = _layers(model)
        #: The names of the nodes with weights, in the order of computation.
        self.layers = list(self._nodes)
        if not self.layers:
            raise UserError(
                f'the graph has none of {", ".join(_WEIGHTED)} with weights: there is '
                'nothing to quantize in this model'
            )
        self._ranges: dict[str, Any] = {}

    def matching(self, patterns: Sequence[str]) -> list[str]:
        """The layers whose names match one of the patterns.

        Raises:
            UserError: If a pattern matches none.
        """
        found = []
        for pattern in patterns:
            matched = [name for name in self.layers if fnmatchcase(name, pattern)]
            if not matched:
                raise UserError(
                    f'--exclude {pattern} matches no layer: choose from '
                    f'{", ".join(self.layers)}'
                )
            found += matched
        return list(dict.fromkeys(found))

    def channel_ranges(self, layer: str) -> np.ndarray:
        """``max |w|`` of each output channel of a layer."""
        from onnx import numpy_helper

        node, weight = self._nodes[layer]
        array = abs(numpy_helper.to_array(weight))
        axis = _output_axis(node) % array.ndim
        return array.max(tuple(i for i in range(array.ndim) if i != axis))

    def calibrate(self, method: str) -> None:
        """Find the range of each activation; nothing where it was found before.

        Raises:
            UserError: If ONNX Runtime cannot.
        """
        if method in self._ranges:
            return
        what = f'calibrate this model ({method})'
        with TemporaryDirectory() as folder:
            with _explaining(what, _AS_FP32):
                calibrator = self._calibrator(method, Path(folder))
            for image in self._track(self.images, f'calibrating, {method}'):
                with _explaining(what, _AS_FP32):
                    # One by one: a histogram is made of all activations that are held.
                    calibrator.collect_data(_Reader([image]))
            with _explaining(what, _AS_FP32):
                ranges = calibrator.compute_data()
                # What a conv and its activation have in common is written into them.
                self._quantizer(Recipe(method, per_channel=False), ranges, [], [])
        self._ranges[method] = ranges

    def _calibrator(self, method: str, folder: Path) -> Any:
        """ONNX Runtime's, which writes files into a folder."""
        import onnx
        from onnxruntime.quantization import CalibrationMethod, create_calibrator

        path, augmented = folder / 'model.onnx', folder / 'augmented.onnx'
        onnx.save(self.model, path)
        methods = {
            'minmax': CalibrationMethod.MinMax,
            'percentile': CalibrationMethod.Percentile,
        }
        # Each end by itself: uint8 need not be symmetric.
        options = {'percentile': PERCENTILE, 'symmetric': False}
        return create_calibrator(
            path,
            _quantizable(),
            str(augmented),
            methods[method],
            extra_options=options if method == 'percentile' else {},
        )

    def quantize(
        self, recipe: Recipe, keep: Sequence[str] = (), only: str | None = None
    ) -> 'ModelProto':
        """The graph in int8.

        Args:
            recipe: How.
            keep: Layers that stay in fp32. Default: none.
            only: The one node that is quantized. Default: all that can be.

        Raises:
            UserError: If ONNX Runtime cannot quantize it.
        """
        self.calibrate(recipe.method)
        remedy = 'leave layers out by --exclude'
        with _explaining(f'quantize this model ({recipe})', remedy):
            nodes, ranges = [only] if only else [], self._ranges[recipe.method]
            quantizer = self._quantizer(recipe, ranges, nodes, list(keep))
            quantizer.quantize_model()
            # What it adds stands at the end.
            quantizer.model.topological_sort()
        return quantizer.model.model

    def _quantizer(
        self, recipe: Recipe, ranges: Any, nodes: list[str], keep: list[str]
    ) -> Any:
        """ONNX Runtime's, which copies the graph."""
        from onnxruntime.quantization import QuantType
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

        return QDQQuantizer(
            self.model,
            recipe.per_channel,
            self.reduce_range,
            QuantType.QInt8,
            QuantType.QUInt8,
            ranges,
            nodes,
            keep,
            _quantizable(),
            {},
        )


class _Reader:
    """Gives calibration its inputs."""

    def __init__(self, images: Sequence[np.ndarray]) -> None:
        self._images = iter(images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next input; None after the last."""
        image = next(self._images, None)
        return None if image is None else {'input': image}


def prepared(path: Path) -> 'ModelProto':
    """An exported graph as ONNX Runtime wants it for quantizing.

    Its layers are called as the modules that they come from.

    Raises:
        UserError: If it cannot be prepared.
    """
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with TemporaryDirectory() as folder, _explaining('prepare this model', _AS_FP32):
        out = Path(folder, 'prepared.onnx')
        quant_pre_process(path, out)
        model = onnx.load(out)
    names = {node.name for node in model.graph.node}
    for node, _ in _layers(model).values():
        # Without the operator.
        name = node.name.rpartition('/')[0]
        if name and name not in names:
            names.add(name)
            node.name = name
    return model


def _layers(model: 'ModelProto') -> dict[str, tuple['NodeProto', 'TensorProto']]:
    """The nodes with weights, and these, by the node's name."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    return {
        node.name: (node, weights[node.input[1]])
        for node in model.graph.node
        if node.op_type in _WEIGHTED and node.input[1] in weights
    }


def _output_axis(node: 'NodeProto') -> int:
    """The axis of a layer's weight that its output channels lie on."""
    if node.op_type == 'Gemm':
        return 0 if any(a.name == 'transB' and a.i for a in node.attribute) else 1
    return {'Conv': 0, 'ConvTranspose': 1, 'MatMul': -1}[node.op_type]


def _quantizable() -> list[str]:
    """The operators that ONNX Runtime quantizes."""
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    return sorted({*QDQRegistry, *QLinearOpsRegistry})


@contextmanager
def _explaining(what: str, remedy: str) -> Iterator[None]:
    """Make one sentence of what ONNX Runtime raises, and hide what it prints."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with redirect_stdout(io.StringIO()):
            yield
    except Exception as error:
        # It may raise anything.
        raise UserError(
            f'ONNX Runtime cannot {what} ({reason(error)}): {remedy}'
        ) from error
    finally:
        logging.disable(before)
