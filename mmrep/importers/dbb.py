"""The layout of the official DBB, https://github.com/DingXiaoH/DiverseBranchBlock.

The published weights are older than the code and lack the inner ``bn`` of ``bn.bn``.
"""

from mmrep.models.backbones import DBBMobileNetV1

from .dbb_config import dbb_config
from .layout import Layout
from .renaming import every_leaf, under

_BLOCK = {
    r'dbb_origin\.conv': 'branch_kxk.conv',
    r'dbb_origin\.bn': 'branch_kxk.norm',
    r'dbb_1x1\.conv': 'branch_1x1.conv',
    r'dbb_1x1\.bn': 'branch_1x1.norm',
    r'dbb_1x1_kxk\.(?:id)?conv1': 'branch_1x1_kxk.conv1',
    r'dbb_1x1_kxk\.bn1(?:\.bn)?': 'branch_1x1_kxk.norm1',
    r'dbb_1x1_kxk\.conv2': 'branch_1x1_kxk.conv2',
    r'dbb_1x1_kxk\.bn2': 'branch_1x1_kxk.norm2',
    r'dbb_avg\.conv': 'branch_avg.conv1',
    r'dbb_avg\.bn(?:\.bn)?': 'branch_avg.norm1',
    r'dbb_avg\.avgbn': 'branch_avg.norm2',
    r'dbb_reparam': 'branch_reparam',
}

#: The 3x3 units, and the other layers.
RESNET_UNITS = {r'stage([1-4])\.(\d+)\.(conv[12])': r'backbone.layer\1.\2.\3'}
RESNET_PLAIN = {
    r'stage0\.conv1\.conv': 'backbone.conv1',
    r'stage0\.conv1\.bn': 'backbone.bn1',
    r'stage([1-4])\.(\d+)\.conv([123])\.conv': r'backbone.layer\1.\2.conv\3',
    r'stage([1-4])\.(\d+)\.conv([123])\.bn': r'backbone.layer\1.\2.bn\3',
    r'stage([1-4])\.(\d+)\.shortcut\.conv': r'backbone.layer\1.\2.downsample.0',
    r'stage([1-4])\.(\d+)\.shortcut\.bn': r'backbone.layer\1.\2.downsample.1',
}

#: The official code numbers the thirteen layers in a row, mmrep within stages.
_MOBILENET_LAYERS = {
    rf'stem\.{n}': f'backbone.stage_{i}.{j}'
    for n, (i, j) in enumerate(
        (i, j)
        for i, (_, count) in enumerate(DBBMobileNetV1.layers, 1)
        for j in range(count)
    )
}
_MOBILENET_UNITS = {
    r'conv1': 'backbone.stage_1.stem',
    **under(_MOBILENET_LAYERS, {r'depthwise': 'depthwise'}),
}
_POINTWISE = {
    r'pointwise\.conv': 'pointwise.branch_kxk.conv',
    r'pointwise\.bn': 'pointwise.branch_kxk.norm',
}

DBB = Layout(
    name='dbb',
    mark=r'\.dbb_\w+\.',
    rules=every_leaf(
        {
            **under({**RESNET_UNITS, **_MOBILENET_UNITS}, _BLOCK),
            **RESNET_PLAIN,
            **under(_MOBILENET_LAYERS, _POINTWISE),
            r'linear': 'head.fc',
        }
    ),
    family=dbb_config,
    deploy_rules=every_leaf(
        under(_MOBILENET_LAYERS, {r'pointwise\.conv': 'pointwise.branch_reparam'})
    ),
)
