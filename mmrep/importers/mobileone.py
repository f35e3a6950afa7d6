"""The layouts of MobileOne: https://github.com/apple/ml-mobileone, timm, mmpretrain."""

from .layout import Layout
from .mobileone_config import mobileone_config
from .renaming import Rules, every_leaf, under


def _rules(
    places: Rules,
    conv: str,
    scale: str,
    identity: str,
    reparam: str,
    se: tuple[str, str],
    head: str,
    norm: str = 'bn',
) -> Rules:
    """The rules of a layout, from its names of the parts of a block."""
    parts = {
        rf'{conv}\.(?P<n>\d+)\.conv': r'branch_conv_list.\g<n>.conv',
        rf'{conv}\.(?P<n>\d+)\.{norm}': r'branch_conv_list.\g<n>.norm',
        rf'{scale}\.conv': 'branch_scale.conv',
        rf'{scale}\.{norm}': 'branch_scale.norm',
        identity: 'branch_norm',
        reparam: 'branch_reparam',
        se[0]: 'se.conv1.conv',
        se[1]: 'se.conv2.conv',
    }
    return every_leaf({**under(places, parts), head: 'head.fc'})


MOBILEONE = Layout(
    name='mobileone',
    mark=r'^stage[1-4]\.\d+\.(rbr_conv|reparam_conv)\.',
    rules=_rules(
        {r'stage0': 'backbone.stage0', r'stage([1-4])\.(\d+)': r'backbone.stage\1.\2'},
        conv='rbr_conv',
        scale='rbr_scale',
        identity='rbr_skip',
        reparam='reparam_conv',
        se=(r'se\.reduce', r'se\.expand'),
        head='linear',
    ),
    family=mobileone_config,
)

TIMM_MOBILEONE = Layout(
    name='timm-mobileone',
    # Every second conv of a MobileOne is 1x1, but no fused conv of a RepVGG.
    mark=r'^stages\.\d\.\d+\.(conv_kxk\.\d+\.|reparam_conv\.weight \d+ \d+ 1 1$)',
    rules=_rules(
        {
            r'stem': 'backbone.stage0',
            # timm counts stages from 0.
            **{rf'stages\.{i}\.(\d+)': rf'backbone.stage{i + 1}.\1' for i in range(4)},
        },
        conv='conv_kxk',
        scale='conv_scale',
        identity='identity',
        reparam='reparam_conv',
        se=(r'attn\.fc1', r'attn\.fc2'),
        head=r'head\.fc',
    ),
    family=mobileone_config,
)

MMPRETRAIN_MOBILEONE = Layout(
    name='mmpretrain-mobileone',
    mark=r'^backbone\.stage[1-4]\.\d+\.(branch_conv_list|branch_reparam)\.',
    rules=_rules(
        {r'backbone\.(stage0|stage\d+\.\d+)': r'backbone.\1'},
        conv='branch_conv_list',
        scale='branch_scale',
        identity='branch_norm',
        reparam='branch_reparam',
        se=(r'se\.conv1\.conv', r'se\.conv2\.conv'),
        head=r'head\.fc',
        norm='norm',
    ),
    family=mobileone_config,
    # mmcv 1.x stores them beside the weights, which are already the averaged ones.
    left_out={r'ema_\w+': 'buffers of EMAHook'},
)
