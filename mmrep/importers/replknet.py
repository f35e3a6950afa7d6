"""The layouts of RepLKNet: of https://github.com/DingXiaoH/RepLKNet-pytorch and mmpretrain.

In deploy form, only the large kernels are fused.
"""

from .layout import Layout
from .replknet_config import replknet_config

_BODY = r'((?:stem|stages|transitions)\.\d+\..+)'
_MARK = r'stages\.\d\.blocks\.\d+\.large_kernel\.'

REPLKNET = Layout(
    name='replknet',
    mark=f'^{_MARK}',
    rules={
        _BODY: r'backbone.\1',
        # The norm before the classifier, of the last stage's output.
        r'norm\.(\w+)': r'backbone.stages.3.norm.\1',
        r'head\.(\w+)': r'head.fc.\1',
    },
    family=replknet_config,
)

MMPRETRAIN_REPLKNET = Layout(
    name='mmpretrain-replknet',
    mark=rf'^backbone\.{_MARK}',
    rules={
        rf'backbone\.{_BODY}': r'backbone.\1',
        r'head\.fc\.(\w+)': r'head.fc.\1',
    },
    family=replknet_config,
)
