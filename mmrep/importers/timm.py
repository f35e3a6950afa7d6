"""The layout of timm's RepVGG, a ``ByobNet``."""

from .layout import Layout
from .renaming import every_leaf, under
from .repvgg_config import repvgg_config

_PARTS = {
    r'conv_kxk\.conv': 'branch_3x3.conv',
    r'conv_kxk\.bn': 'branch_3x3.norm',
    r'conv_1x1\.conv': 'branch_1x1.conv',
    r'conv_1x1\.bn': 'branch_1x1.norm',
    r'identity': 'branch_norm',
    r'reparam_conv': 'branch_reparam',
    r'attn\.fc1': 'se_layer.conv1.conv',
    r'attn\.fc2': 'se_layer.conv2.conv',
}
_PLACES = {
    r'stem': 'backbone.stem',
    # timm counts stages from 0.
    **{rf'stages\.{i}\.(\d+)': rf'backbone.stage_{i + 1}.\1' for i in range(4)},
}

TIMM = Layout(
    name='timm',
    mark=r'^stages\.\d\.\d+\.(conv_kxk\.conv|reparam_conv)\.',
    # Found in MobileOnes.
    foreign_mark=r'\.reparam_conv\.weight \d+ \d+ 1 1$',
    rules=every_leaf({**under(_PLACES, _PARTS), r'head\.fc': 'head.fc'}),
    family=repvgg_config,
)
