"""The mathematics of structural re-parameterization; imports torch only."""

from .deploy import (
    DeployReport,
    count_parameters,
    fuse_conv_norm,
    reparam_blocks,
    switch_to_deploy,
)
from .equivalence import (
    Difference,
    branch_by_branch,
    compare_outputs,
    compare_tensors,
    flatten_outputs,
)
from .fold import (
    LinearConv,
    fold_branches,
    fold_layer,
    has_running_statistics,
    is_batch_norm,
)
from .geometry import (
    ConvGeometry,
    NotFoldableError,
    conv2d_geometry,
    conv_geometry,
    current_weight,
    register_linear_conv,
)
from .transforms import (
    add_branches,
    average_kernel,
    bn_affine,
    concat_depth,
    constant_response,
    fuse_bn,
    identity_kernel,
    merge_1x1_kxk,
    pad_kernel,
    scale_kernel,
)

__all__ = [
    'ConvGeometry',
    'DeployReport',
    'Difference',
    'LinearConv',
    'NotFoldableError',
    'add_branches',
    'average_kernel',
    'bn_affine',
    'branch_by_branch',
    'compare_outputs',
    'compare_tensors',
    'concat_depth',
    'constant_response',
    'conv2d_geometry',
    'conv_geometry',
    'count_parameters',
    'current_weight',
    'flatten_outputs',
    'fold_branches',
    'fold_layer',
    'fuse_bn',
    'fuse_conv_norm',
    'has_running_statistics',
    'identity_kernel',
    'is_batch_norm',
    'merge_1x1_kxk',
    'pad_kernel',
    'register_linear_conv',
    'reparam_blocks',
    'scale_kernel',
    'switch_to_deploy',
]
