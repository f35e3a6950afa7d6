"""The layout of ACNet's ResNets, in their authors' two projects.

https://github.com/DingXiaoH/ACNet, whose 7x7 stem is a block as well, and
https://github.com/DingXiaoH/DiverseBranchBlock. Of the first, only the train form is read,
because its deploy form still has the norms of the plain convs.
"""

from collections.abc import Mapping

from torch import Tensor

from mmrep.errors import CheckpointError

from .dbb import RESNET_PLAIN, RESNET_UNITS
from .dbb_config import dbb_config
from .layout import Layout
from .renaming import every_leaf, under

_BLOCK = {
    f'{part}_{layer}': f'{branch}.{name}'
    for part, branch in (
        ('square', 'branch_kxk'),
        ('ver', 'branch_kx1'),
        ('hor', 'branch_1xk'),
    )
    for layer, name in (('conv', 'conv'), ('bn', 'norm'))
} | {'fused_conv': 'branch_reparam'}

#: A unit with an activation is a sequence, in which the block is named ``acb``.
_STAGEWISE_UNITS = {
    r'conv1\.acb': 'backbone.conv1',
    r'stage([1-4])\.block(\d+)\.(conv[12])(?:\.acb)?': r'backbone.layer\1.\2.\3',
}
_STAGEWISE_PLAIN = {
    r'stage([1-4])\.block(\d+)\.conv([13])\.conv': r'backbone.layer\1.\2.conv\3',
    r'stage([1-4])\.block(\d+)\.conv([13])\.bn': r'backbone.layer\1.\2.bn\3',
    r'stage([1-4])\.projection\.conv': r'backbone.layer\1.0.downsample.0',
    r'stage([1-4])\.projection\.bn': r'backbone.layer\1.0.downsample.1',
}


def _acnet_config(
    state: Mapping[str, Tensor], layout: Layout, arch: str | None = None
) -> dict:
    """The config of the ResNet that has these weights; see :func:`dbb_config`."""
    fused = 'conv1.branch_reparam.weight' in state
    if fused and any('.downsample.1.' in key for key in state):
        raise CheckpointError(
            'its blocks are fused and its other convs are not: give the train form'
        )
    config = dbb_config(state, layout, arch)
    if any(key.startswith('conv1.branch_') for key in state):
        config['reparam_kernels'] = (3, 5, 7)
    return config


ACNET = Layout(
    name='acnet',
    mark=r'\.(square_conv|fused_conv)\.weight ',
    rules=every_leaf(
        {
            **under({**RESNET_UNITS, **_STAGEWISE_UNITS}, _BLOCK),
            **RESNET_PLAIN,
            **_STAGEWISE_PLAIN,
            r'(?:linear|fc)': 'head.fc',
        }
    ),
    family=_acnet_config,
    deploy_mark=r'\.fused_conv\.',
    options=dict(
        type='mmrep.ReparamResNet', block_cfg=dict(type='mmrep.AsymmetricConvBlock')
    ),
)
