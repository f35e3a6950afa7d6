"""Read configs, build models, and turn checkpoints into verified deploy files."""

from .building import build_model, building_fault
from .config import (
    Shape,
    deploy_argument,
    deploy_config,
    enter_scope,
    for_one_process,
    input_shape,
    model_nodes,
    read_config,
    without_pretrained,
)
from .deploying import Deployed, deploy_checkpoint
from .expanding import BLOCKS, ExpandedFiles, expand_checkpoint
from .export import OnnxExport, export_onnx
from .pair import check_pair
from .running import VerificationError
from .shipped_files import config_of, list_models, shipped
from .verification import Verification

__all__ = [
    'BLOCKS',
    'Deployed',
    'ExpandedFiles',
    'OnnxExport',
    'Shape',
    'Verification',
    'VerificationError',
    'build_model',
    'building_fault',
    'check_pair',
    'config_of',
    'deploy_argument',
    'deploy_checkpoint',
    'deploy_config',
    'enter_scope',
    'expand_checkpoint',
    'export_onnx',
    'for_one_process',
    'input_shape',
    'list_models',
    'model_nodes',
    'read_config',
    'shipped',
    'without_pretrained',
]
