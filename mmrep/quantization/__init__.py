"""Quantize a checkpoint to an int8 ONNX file, and measure its accuracy."""

from .comparison import Int8, compare_recipes
from .equalization import equalize
from .evaluation import HostEvaluation
from .quantizer import METHODS, Quantizer, Recipe, prepared
from .quantizing import AUTO, Layer, QuantizedOnnx, quantize_onnx
from .sessions import Session

__all__ = [
    'AUTO',
    'METHODS',
    'HostEvaluation',
    'Int8',
    'Layer',
    'QuantizedOnnx',
    'Quantizer',
    'Recipe',
    'Session',
    'compare_recipes',
    'equalize',
    'prepared',
    'quantize_onnx',
]
