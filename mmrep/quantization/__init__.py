"""From a checkpoint to an int8 ONNX file whose accuracy was measured."""

from .comparison import int8_metrics
from .equalization import equalize
from .evaluation import HostEvaluation
from .quantizer import METHODS, Quantizer, Recipe, prepared
from .quantizing import AUTO, Layer, QuantizedOnnx, quantize_onnx
from .sessions import Session

__all__ = [
    'AUTO',
    'METHODS',
    'HostEvaluation',
    'Layer',
    'QuantizedOnnx',
    'Quantizer',
    'Recipe',
    'Session',
    'equalize',
    'int8_metrics',
    'prepared',
    'quantize_onnx',
]
