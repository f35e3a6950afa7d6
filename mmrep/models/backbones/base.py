"""What every backbone of mmrep does: freezing, norm_eval and the switch."""

from collections.abc import Iterable, Sequence

from mmengine.model import BaseModule
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import nn

from mmrep.reparam import has_running_statistics, reparam_blocks, switch_to_deploy


class ArchitectureError(ValueError, AssertionError):
    """Arguments that do not describe a network.

    An ``AssertionError`` as well, which is what mmpretrain and mmseg raise there.
    """


def require(condition: bool, message: str) -> None:
    """Raise :class:`ArchitectureError` with the message unless the condition holds."""
    if not condition:
        raise ArchitectureError(message)


def require_stages(out_indices: Sequence[int], num_stages: int) -> None:
    """Raise :class:`ArchitectureError` unless every index is that of a stage."""
    require(
        len(out_indices) > 0 and all(0 <= index < num_stages for index in out_indices),
        f'out_indices={tuple(out_indices)} of {num_stages} stages: name one or more of 0 '
        f'to {num_stages - 1}',
    )


class ReparamBackbone(BaseModule):
    """The base of the backbones.

    A subclass says in :meth:`stem_and_stages` what is frozen first, and calls
    ``self.train()`` at the end of its construction, so that freezing holds from then on.

    Args:
        frozen_stages (int): Stages whose parameters and statistics stay as they are, the
            stem counted as stage 0. Default: -1, none.
        norm_eval (bool): Keep every batch norm in eval mode while training.
            Default: False.
        init_cfg (dict | list[dict], optional): Initialization. Default: None.
    """

    #: Read by the walker: ``switch_to_deploy`` is that of the blocks inside.
    walks_over_blocks = True

    def __init__(
        self,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval

    @property
    def deploy(self) -> bool:
        """Whether every block is one conv; there is at least one."""
        blocks = reparam_blocks(self).values()
        return bool(blocks) and all(block.deploy for block in blocks)

    def stem_and_stages(self) -> Iterable[list[nn.Module]]:
        """The modules of the stem, then those of every stage."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> 'ReparamBackbone':
        """Set the mode, but keep frozen stages and, with ``norm_eval``, norms in eval."""
        super().train(mode)
        for stage, modules in enumerate(self.stem_and_stages()):
            if stage > self.frozen_stages:
                break
            for module in modules:
                module.eval().requires_grad_(False)
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm) or has_running_statistics(module):
                    module.eval()
        return self

    def switch_to_deploy(self) -> None:
        """Turn every block into one conv; see :func:`mmrep.reparam.switch_to_deploy`."""
        switch_to_deploy(self)
