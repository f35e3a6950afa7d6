"""The layout of the official RepVGG, https://github.com/DingXiaoH/RepVGG."""

from .layout import Layout
from .renaming import every_leaf, under
from .repvgg_config import repvgg_config

#: The parts of a block, in the names of the official code; RepVGGplus has a ``post_se``.
BLOCK = {
    r'rbr_dense\.conv': 'branch_3x3.conv',
    r'rbr_dense\.bn': 'branch_3x3.norm',
    r'rbr_1x1\.conv': 'branch_1x1.conv',
    r'rbr_1x1\.bn': 'branch_1x1.norm',
    r'rbr_identity': 'branch_norm',
    r'rbr_reparam': 'branch_reparam',
    r'(?:post_)?se\.down': 'se_layer.conv1.conv',
    r'(?:post_)?se\.up': 'se_layer.conv2.conv',
}
#: The names of the blocks.
PLACES = {
    r'stage0': 'backbone.stem',
    r'stage([1-4])\.(\d+)': r'backbone.stage_\1.\2',
}

REPVGG = Layout(
    name='repvgg',
    mark=r'^stage[1-4]\.\d+\.rbr_(dense|reparam)\.',
    # Found in QARepVGGs and OREPA-RepVGGs.
    foreign_mark=r'\.rbr_(1x1\.weight|dense\.weight_rbr_origin) ',
    rules=every_leaf({**under(PLACES, BLOCK), r'linear': 'head.fc'}),
    family=repvgg_config,
)
