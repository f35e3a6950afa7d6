"""RepOpt-VGG."""

import math
from typing import Any

from mmrep.registry import MODELS

from .repvgg import RepVGG

_LARGE = dict(RepVGG.arch_settings['B1'], num_blocks=(8, 14, 24, 1))


@MODELS.register_module()
class RepOptVGG(RepVGG):
    """RepVGG as a plain network from the start: convs, norms and activations.

    Trained with :class:`~mmrep.engine.RepOptimizerConstructor`, the kernels learn as the
    sum of RepVGG's scaled branches would. The scales come from a run of the same network
    with ``block_cfg=dict(type='mmrep.ScaleSumBlock')``, in which the scales of the convs
    start as 1 in the first block of a stage and as ``sqrt(2 / i)`` in the i-th after it.

    Source: `Re-parameterizing Your Optimizers rather than Architectures
    <https://arxiv.org/abs/2205.15242>`_, section 4.1 and table 1.

    Args:
        arch (str | dict): A name in ``arch_settings``, or a dict as for ``RepVGG``.
        block_cfg (dict): Config of the blocks.
            Default: ``dict(type='mmrep.ConvNormBlock')``.
        **kwargs: The other arguments of :class:`RepVGG`.
    """

    arch_settings = {
        'B1': RepVGG.arch_settings['B1'],
        'B2': RepVGG.arch_settings['B2'],
        'L1': _LARGE,
        'L2': dict(_LARGE, width_factor=RepVGG.arch_settings['B2']['width_factor']),
    }

    def __init__(
        self,
        arch: str | dict,
        *,
        block_cfg: dict = dict(type='mmrep.ConvNormBlock'),
        **kwargs: Any,
    ) -> None:
        super().__init__(arch, block_cfg=block_cfg, **kwargs)
        for stage in self.stages:
            for number, block in enumerate(getattr(self, stage)):
                if number and hasattr(block, 'init_scales') and 'scale' not in block_cfg:
                    block.init_scales(math.sqrt(2 / number))
