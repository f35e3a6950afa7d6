"""The layout of the official RepVGGplus, https://github.com/DingXiaoH/RepVGG."""

from .layout import Layout
from .renaming import every_leaf, under
from .repvgg import BLOCK
from .repvgg_config import repvgg_config

_PLACES = {
    r'stage0': 'backbone.stem',
    r'stage([12])\.blocks\.(\d+)': r'backbone.stage_\1.\2',
    r'stage3_first\.blocks\.(\d+)': r'backbone.stage_3.\1',
    r'stage3_second\.blocks\.(\d+)': r'backbone.stage_4.\1',
    r'stage4\.blocks\.(\d+)': r'backbone.stage_5.\1',
}
_AUX = {
    f'{stage}_aux.{part}': new.format(i)
    for i, stage in enumerate(('stage1', 'stage2', 'stage3_first'))
    for part, new in (
        (r'0\.conv', 'head.aux_convs.{}.conv'),
        (r'0\.bn', 'head.aux_convs.{}.bn'),
        (r'3', 'head.aux_heads.{}.fc'),
    )
}

REPVGGPLUS = Layout(
    name='repvggplus',
    mark=r'^stage\d\w*\.blocks\.\d+\.rbr_',
    rules=every_leaf({**under(_PLACES, BLOCK), **_AUX, r'linear': 'head.head.fc'}),
    family=repvgg_config,
    # The first half of the third stage downsamples, the second half does not.
    arch_options=dict(se_position='after_act', strides=(2, 2, 2, 1, 2)),
)
