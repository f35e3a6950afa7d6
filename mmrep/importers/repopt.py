"""The layouts of RepOpt-VGG and its search: https://github.com/DingXiaoH/RepOptimizers."""

from functools import partial

from mmrep.models.backbones import RepOptVGG

from .layout import Layout
from .renaming import every_leaf, under
from .repvgg import PLACES
from .repvgg_config import repvgg_config

_PLAIN = {r'conv': 'branch_kxk.conv', r'bn': 'branch_kxk.norm'}
_SCALED = {
    r'conv': 'branch_kxk.conv',
    r'scale_conv': 'branch_kxk.scale',
    r'conv_1x1': 'branch_1x1.conv',
    r'scale_1x1': 'branch_1x1.scale',
    r'scale_identity': 'branch_identity.scale',
    r'bn': 'post_norm',
}
_FAMILY = partial(repvgg_config, kind=RepOptVGG)

REPOPT = Layout(
    name='repopt',
    mark=r'^stage[1-4]\.\d+\.conv\.weight ',
    foreign_mark=r'\.scale_conv\.weight ',
    rules=every_leaf({**under(PLACES, _PLAIN), r'linear': 'head.fc'}),
    family=_FAMILY,
)

REPOPT_SEARCH = Layout(
    name='repopt-search',
    mark=r'^stage[1-4]\.\d+\.scale_conv\.weight ',
    rules=every_leaf({**under(PLACES, _SCALED), r'linear': 'head.fc'}),
    family=_FAMILY,
    options=dict(block_cfg=dict(type='mmrep.ScaleSumBlock')),
)
