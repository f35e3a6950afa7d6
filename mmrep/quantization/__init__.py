"""From a checkpoint to an int8 ONNX file whose accuracy was measured."""

from .comparison import int8_metrics
from .equalization import equalize
from .evaluation import HostEvaluation
from .quantizer import METHODS, Recipe
from .quantizing import AUTO, Layer, QuantizedOnnx, quantize_onnx

__all__ = [
    'AUTO',
    'METHODS',
    'HostEvaluation',
    'Layer',
    'QuantizedOnnx',
    'Recipe',
    'equalize',
    'int8_metrics',
    'quantize_onnx',
]
