"""Backbones that are a sequence of blocks: VGG, AlexNet and MobileNetV1."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from mmengine.model import Sequential
from torch import Tensor, nn

from mmrep.registry import MODELS

from .base import INIT_CFG, ReparamBackbone, require, require_stages
from .units import REPARAM_KERNELS, UnitConfig

_DBB = dict(type='mmrep.DiverseBranchBlock')


class ChainBackbone(ReparamBackbone):
    """A sequence of stages, whose blocks are chosen by a config.

    A subclass builds its stages in :meth:`build_stage`.

    Args:
        num_stages (int): Number of stages.
        in_channels (int): Number of channels of the image. Default: 3.
        out_indices (Sequence[int], optional): Stages, from 0, whose outputs are returned.
            Default: None, which means the last one.
        frozen_stages (int): Number of stages to freeze, from the first. There is no
            separate stem, so that 0 freezes nothing. Default: -1, none.
        conv_cfg (dict, optional): Config of the convs. Default: None, ``nn.Conv2d``.
        norm_cfg (dict): Config of the norms. Default: ``dict(type='BN')``.
        act_cfg (dict): Config of the activations. Default: ``dict(type='ReLU')``.
        with_cp (bool): Recompute blocks in the backward pass to save memory.
            Default: False.
        deploy (bool): Build every block as one conv. Default: False.
        norm_eval (bool): Keep batch norms in eval mode while training. Default: False.
        block_cfg (dict, optional): Config of the blocks; None for plain convs with
            norms. Default: ``dict(type='mmrep.DiverseBranchBlock')``.
        reparam_kernels (Sequence[int]): Kernel sizes of the units that become this block;
            the others are plain. Default: ``(3, 5)``.
        init_cfg (dict | list[dict], optional): Initialization. Default: Kaiming for
            convs, 1 for the weights of norms.

    Raises:
        ArchitectureError: If the arguments describe no network.
    """

    def __init__(
        self,
        num_stages: int,
        in_channels: int = 3,
        out_indices: Sequence[int] | None = None,
        frozen_stages: int = -1,
        conv_cfg: dict | None = None,
        norm_cfg: dict = dict(type='BN'),
        act_cfg: dict = dict(type='ReLU'),
        with_cp: bool = False,
        deploy: bool = False,
        norm_eval: bool = False,
        block_cfg: dict | None = _DBB,
        reparam_kernels: Sequence[int] = REPARAM_KERNELS,
        init_cfg: dict | Sequence[dict] | None = INIT_CFG,
    ) -> None:
        super().__init__(frozen_stages, norm_eval, init_cfg)
        out_indices = (num_stages - 1,) if out_indices is None else tuple(out_indices)
        require_stages(out_indices, num_stages)
        self.in_channels = in_channels
        self.out_indices = out_indices
        self.units = UnitConfig(
            conv_cfg, norm_cfg, act_cfg, block_cfg, deploy, reparam_kernels, with_cp
        )
        self.stages = [f'stage_{i + 1}' for i in range(num_stages)]
        for i, name in enumerate(self.stages):
            self.add_module(name, self.build_stage(i))
        self.train()

    def build_stage(self, index: int) -> Sequential:
        """The blocks of stage ``index``, from 0."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """``(N, in_channels, H, W)`` to the outputs of the stages in ``out_indices``."""
        return self.run_stages(x)


@MODELS.register_module()
class DBBVGG(ChainBackbone):
    """VGG without its linear layers: stages of 3x3 blocks that end with a max pooling.

    Source: `Very Deep Convolutional Networks <https://arxiv.org/abs/1409.1556>`_,
    table 1; for CIFAR, DBB, section 4.1: global average pooling, a linear layer with 512
    outputs and the classifier follow.

    Args:
        depth (int): 11, 13, 16 or 19. Default: 16.
        base_channels (int): Number of channels of the first stage. Default: 64.
        **kwargs: See :class:`ChainBackbone`.
    """

    arch_settings = {
        11: (1, 1, 2, 2, 2),
        13: (2, 2, 2, 2, 2),
        16: (2, 2, 3, 3, 3),
        19: (2, 2, 4, 4, 4),
    }

    def __init__(self, depth: int = 16, base_channels: int = 64, **kwargs: Any) -> None:
        require(
            depth in self.arch_settings,
            f'depth {depth} is unknown; choose from {tuple(self.arch_settings)}',
        )
        self.num_blocks = self.arch_settings[depth]
        self.widths = [base_channels * min(2**i, 8) for i in range(5)]
        super().__init__(num_stages=5, **kwargs)

    def build_stage(self, index: int) -> Sequential:
        outs = self.widths[index]
        ins = self.widths[index - 1] if index else self.in_channels
        blocks = [
            self.units.block(outs if j else ins, outs, 3, padding=1)
            for j in range(self.num_blocks[index])
        ]
        return Sequential(*blocks, nn.MaxPool2d(2, 2))


@MODELS.register_module()
class DBBAlexNet(ChainBackbone):
    """AlexNet without its linear layers: an 11x11, a 5x5 and three 3x3 blocks.

    Every stage ends with a max pooling. The 11x11 conv stays plain.

    Source: `One weird trick <https://arxiv.org/abs/1404.5997>`_; DBB, section 4.1.

    Args:
        flatten (bool): Return the output of the last stage as ``(N, C H W)``, the input of
            a linear head. Default: False.
        **kwargs: See :class:`ChainBackbone`.
    """

    #: Channels, kernel size, stride and padding of the convs of each stage.
    layers = (
        ((64, 11, 4, 2),),
        ((192, 5, 1, 2),),
        ((384, 3, 1, 1), (384, 3, 1, 1), (256, 3, 1, 1)),
    )

    def __init__(self, flatten: bool = False, **kwargs: Any) -> None:
        self.flatten = flatten
        super().__init__(num_stages=3, **kwargs)

    def build_stage(self, index: int) -> Sequential:
        ins = self.layers[index - 1][-1][0] if index else self.in_channels
        blocks = []
        for outs, kernel_size, stride, padding in self.layers[index]:
            blocks.append(
                self.units.block(ins, outs, kernel_size, stride=stride, padding=padding)
            )
            ins = outs
        return Sequential(*blocks, nn.MaxPool2d(3, 2))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        outs = super().forward(x)
        if self.flatten and len(self.stages) - 1 in self.out_indices:
            outs = (*outs[:-1], outs[-1].flatten(1))
        return outs


@MODELS.register_module()
class DBBMobileNetV1(ChainBackbone):
    """MobileNetV1: a 3x3 block, then depthwise 3x3 blocks with 1x1 convs after them.

    The stem is part of the first stage; every other stage starts with stride 2.

    Source: `MobileNets <https://arxiv.org/abs/1704.04861>`_, table 1; DBB, section 4.1:
    a depthwise block has twice as many internal channels.

    Args:
        width_factor (float): Factor of all numbers of channels. Default: 1.
        **kwargs: See :class:`ChainBackbone`.
    """

    #: Channels and number of depthwise-separable layers of each stage.
    layers = ((64, 1), (128, 2), (256, 2), (512, 6), (1024, 2))
    stem_channels = 32

    def __init__(self, width_factor: float = 1, **kwargs: Any) -> None:
        self.width_factor = width_factor
        super().__init__(num_stages=5, **kwargs)

    def _width(self, channels: int) -> int:
        return int(channels * self.width_factor)

    def build_stage(self, index: int) -> Sequential:
        outs, count = self._width(self.layers[index][0]), self.layers[index][1]
        ins = self._width(self.layers[index - 1][0] if index else self.stem_channels)
        stage = Sequential()
        if index == 0:
            stem = self.units.block(self.in_channels, ins, 3, stride=2, padding=1)
            stage.add_module('stem', stem)
        for j in range(count):
            stride = 2 if index and j == 0 else 1
            depthwise = self.units.block(ins, ins, 3, stride=stride, padding=1, groups=ins)
            pointwise = self.units.block(ins, outs, 1)
            layer = OrderedDict(depthwise=depthwise, pointwise=pointwise)
            stage.add_module(str(j), Sequential(layer))
            ins = outs
        return stage
