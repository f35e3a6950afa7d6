"""The layout of the official UniRepLKNet, https://github.com/AILab-CVC/UniRepLKNet."""

import re
from collections.abc import Mapping

from torch import Tensor

from .layout import Layout
from .renaming import every_leaf, under
from .unireplknet_config import unireplknet_config

_PLACES = {
    # The official code counts stages from 0.
    rf'stages\.{i}\.(\d+)': rf'backbone.stage_{i + 1}.blocks.\1'
    for i in range(4)
}
_POINTWISE = 'pointwise_out.branch_1x1'
_PARTS = {
    r'dwconv\.lk_origin': 'spatial.branch_large.conv',
    r'dwconv\.origin_bn': 'spatial.branch_large.norm',
    r'dwconv\.dil_conv_k(?P<k>\d+)_(?P<r>\d+)': r'spatial.branch_k\g<k>_d\g<r>.conv',
    r'dwconv\.dil_bn_k(?P<k>\d+)_(?P<r>\d+)': r'spatial.branch_k\g<k>_d\g<r>.norm',
    r'norm': 'spatial.post_norm',
    r'dwconv': 'spatial.branch_kxk.conv',
    r'small_norm': 'spatial.branch_kxk.norm',
    r'se\.down': 'spatial.se_layer.conv1.conv',
    r'se\.up': 'spatial.se_layer.conv2.conv',
    r'pwconv1\.1': 'pointwise_in',
    r'pwconv2\.0': f'{_POINTWISE}.conv',
    r'pwconv2\.2': f'{_POINTWISE}.norm',
}
_PARAMETERS = {
    r'act\.1\.gamma': 'grn.gamma',
    r'act\.1\.beta': f'{_POINTWISE}.shift.bias',
    r'gamma': f'{_POINTWISE}.scale.weight',
}
_DEPLOYED = {
    r'dwconv\.lk_origin': 'spatial.branch_reparam',
    r'dwconv': 'spatial.branch_reparam',
    r'pwconv2\.0': 'pointwise_out.branch_reparam',
}
_BETWEEN = {
    r'downsample_layers\.0\.0': 'backbone.stem.0.conv',
    r'downsample_layers\.0\.1': 'backbone.stem.0.norm',
    r'downsample_layers\.0\.3': 'backbone.stem.2.conv',
    r'downsample_layers\.0\.4': 'backbone.stem.2.norm',
    **{
        rf'downsample_layers\.{i}\.{j}': f'backbone.stage_{i + 1}.downsample.{part}'
        for i in (1, 2, 3)
        for j, part in enumerate(('conv', 'norm'))
    },
    # After global pooling of the last stage, or after each stage.
    r'norm': 'backbone.norm_4',
    **{rf'norm{i}': f'backbone.norm_{i + 1}' for i in range(4)},
    r'head': 'head.fc',
}


def _prepare(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn linear layers into 1x1 kernels, and rename norms after small kernels."""
    prepared = {}
    for key, value in weights.items():
        found = re.fullmatch(r'(stages\.\d+\.\d+)\.(?:norm\.(\w+)|(pwconv|act).*)', key)
        if found and found[2] and f'{found[1]}.dwconv.weight' in weights:
            key = f'{found[1]}.small_norm.{found[2]}'
        elif found and found[3] == 'pwconv' and value.dim() == 2:
            value = value[:, :, None, None]
        elif found and found[3] == 'act' and value.dim() == 4:
            value = value.flatten()
        prepared[key] = value
    return prepared


UNIREPLKNET = Layout(
    name='unireplknet',
    mark=r'^stages\.\d\.\d+\.pwconv2\.0\.weight \d+ \d+$',
    rules={
        **under(_PLACES, _PARAMETERS),
        **every_leaf({**under(_PLACES, _PARTS), **_BETWEEN}),
    },
    family=unireplknet_config,
    prepare=_prepare,
    deploy_mark=r'\.pwconv2\.0\.bias ',
    deploy_rules=every_leaf(under(_PLACES, _DEPLOYED)),
)
