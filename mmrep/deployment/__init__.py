"""From configs and checkpoints to verified deploy files."""

from .building import build_model
from .config import (
    Shape,
    deploy_config,
    enter_scope,
    for_one_process,
    input_shape,
    model_nodes,
    read_config,
    takes_deploy,
    without_pretrained,
)
from .convert import Conversion, check_differences, convert
from .export import OnnxExport, export_onnx
from .running import VerificationError, forward

__all__ = [
    'Conversion',
    'OnnxExport',
    'Shape',
    'VerificationError',
    'build_model',
    'check_differences',
    'convert',
    'deploy_config',
    'enter_scope',
    'export_onnx',
    'for_one_process',
    'forward',
    'input_shape',
    'model_nodes',
    'read_config',
    'takes_deploy',
    'without_pretrained',
]
