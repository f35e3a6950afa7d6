"""The layout of the official QARepVGG, https://github.com/cxxgtxy/QARepVGG.

In deploy form, its keys are those of RepVGG, and files are read with that layout.
"""

from .layout import Layout
from .renaming import every_leaf, under
from .repvgg import PLACES
from .repvgg_config import repvgg_config

_BLOCK = {
    r'rbr_dense\.conv': 'branch_kxk.conv',
    r'rbr_dense\.bn': 'branch_kxk.norm',
    r'rbr_1x1': 'branch_1x1.conv',
    r'bn': 'post_norm',
}

QAREPVGG = Layout(
    name='qarepvgg',
    mark=r'^stage[1-4]\.\d+\.rbr_1x1\.weight ',
    rules=every_leaf({**under(PLACES, _BLOCK), r'linear': 'head.fc'}),
    family=repvgg_config,
    options=dict(block_cfg=dict(type='mmrep.QARepVGGBlock')),
)
