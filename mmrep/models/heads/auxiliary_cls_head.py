"""Auxiliary classifiers on earlier stages, for mmpretrain."""

from collections.abc import Sequence
from typing import Any

from mmcv.cnn import ConvModule
from mmengine.model import BaseModule, ModuleList
from mmengine.registry import MODELS as HOST_MODELS
from torch import Tensor, nn

from mmrep.registry import MODELS

Features = tuple[Tensor, ...]


@MODELS.register_module()
class AuxiliaryClsHead(BaseModule):
    """A classification head on the last stage, and others on earlier ones in training.

    ``loss = loss_main + sum loss_aux``. An auxiliary classifier is a 3x3 conv of stride 2
    with norm and ReLU, global average pooling and a head of the host. The deploy form has
    no auxiliary classifiers. The model needs no neck: this head averages the feature maps.

    Source: RepVGGplus, in the `official code <https://github.com/DingXiaoH/RepVGG>`_,
    where the auxiliary losses have the weight 0.1.

    Args:
        head (dict): Config of the host's head on the last feature map.
        auxiliary_heads (Sequence[dict]): Configs of the host's heads on the earlier feature
            maps, in their order; each has ``in_channels``, and its loss a ``loss_weight``.
        norm_cfg (dict): Config of the norms. Default: ``dict(type='BN')``.
        deploy (bool): Leave out the auxiliary classifiers. Default: False.
        init_cfg (dict | list[dict], optional): Initialization. Default: None.
    """

    def __init__(
        self,
        head: dict,
        auxiliary_heads: Sequence[dict],
        norm_cfg: dict = dict(type='BN'),
        deploy: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        self.deploy = deploy
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = HOST_MODELS.build(head)
        if deploy:
            return
        self.aux_convs = ModuleList()
        self.aux_heads = ModuleList()
        for cfg in auxiliary_heads:
            channels = cfg['in_channels']
            conv = ConvModule(channels, channels, 3, stride=2, padding=1, norm_cfg=norm_cfg)
            self.aux_convs.append(conv)
            self.aux_heads.append(HOST_MODELS.build(cfg))

    def _mean(self, x: Tensor) -> Features:
        return (self.pool(x).flatten(1),)

    def forward(self, feats: Features) -> Tensor:
        """The logits of the main head."""
        return self.head(self._mean(feats[-1]))

    def loss(self, feats: Features, data_samples: list, **kwargs: Any) -> dict[str, Tensor]:
        """The losses of all heads; see the host's heads for the arguments.

        Raises:
            ValueError: If there are not as many feature maps as heads.
        """
        losses = self.head.loss(self._mean(feats[-1]), data_samples, **kwargs)
        if self.deploy:
            return losses
        if len(feats) != len(self.aux_heads) + 1:
            raise ValueError(
                f'{len(self.aux_heads)} auxiliary heads and a main one got {len(feats)} '
                "feature maps: set the backbone's out_indices"
            )
        for i, head in enumerate(self.aux_heads):
            mean = self._mean(self.aux_convs[i](feats[i]))
            for name, value in head.loss(mean, data_samples, **kwargs).items():
                losses[f'aux_{i}.{name}'] = value
        return losses

    def predict(self, feats: Features, data_samples: list | None = None) -> list:
        """The main head's predictions."""
        return self.head._get_predictions(self(feats), data_samples)

    def conv_norm_form(self) -> 'AuxiliaryClsHead':
        """The head itself: further training needs its auxiliary classifiers."""
        return self

    def switch_to_deploy(self) -> None:
        """Drop the auxiliary classifiers."""
        if not self.deploy:
            del self.aux_convs, self.aux_heads
            self.deploy = True
