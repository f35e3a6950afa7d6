"""The layout of RepVGG in mmpretrain and mmcls 0.x, which mmrep uses as well."""

from .layout import Layout
from .renaming import every_leaf, under
from .repvgg_config import repvgg_config

_PARTS = {
    part.replace('.', r'\.'): part
    for part in (
        *('branch_3x3.conv', 'branch_3x3.norm', 'branch_1x1.conv', 'branch_1x1.norm'),
        *('branch_norm', 'branch_reparam', 'se_layer.conv1.conv', 'se_layer.conv2.conv'),
    )
}
_PLACES = {r'backbone\.(stem|stage_\d+\.\d+)': r'backbone.\1'}

MMPRETRAIN = Layout(
    name='mmpretrain',
    mark=r'^backbone\.stage_\d+\.\d+\.branch_(3x3|reparam)\.',
    rules=every_leaf(
        {
            **under(_PLACES, _PARTS),
            r'backbone\.ppf\.(conv[12])\.(conv|bn)': r'backbone.ppf.\1.\2',
            r'head\.fc': 'head.fc',
        }
    ),
    family=repvgg_config,
    # mmcv 1.x stores them beside the weights, which are already the averaged ones.
    left_out={r'ema_\w+': 'buffers of EMAHook'},
)
