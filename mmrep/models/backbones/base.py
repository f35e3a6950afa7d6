"""What every backbone of mmrep does: freezing, norm_eval and the switch."""

from collections.abc import Mapping, Sequence
from itertools import chain

from mmengine.model import BaseModule
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import Tensor, nn

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
    """Raise :class:`ArchitectureError` unless every index is that of another stage."""
    require(
        len(out_indices) > 0
        and all(0 <= index < num_stages for index in out_indices)
        and len(set(out_indices)) == len(out_indices),
        f'out_indices={tuple(out_indices)} of {num_stages} stages: name one or more of 0 '
        f'to {num_stages - 1}',
    )


def stage_indices(out_indices: Sequence[int] | int, num_stages: int) -> tuple[int, ...]:
    """Stages by their numbers from 0, given one or more of which may count from the end.

    Raises:
        ArchitectureError: If there is no such stage, or one is named twice.
    """
    indices = [out_indices] if isinstance(out_indices, int) else out_indices
    indices = [index + num_stages if index < 0 else index for index in indices]
    require_stages(indices, num_stages)
    return tuple(indices)


def find_arch(
    arch: str | dict,
    settings: Mapping[str, dict],
    required: Sequence[str],
    optional: Sequence[str] = (),
) -> dict:
    """An architecture by its name, or as it is given.

    Args:
        arch: A name, or a dict.
        settings: The architectures that have names.
        required, optional: The keys of a dict.

    Raises:
        TypeError: If it is neither a name nor a dict.
        ArchitectureError: If no architecture has the name, or a dict lacks a key or has
            another one.
    """
    if isinstance(arch, dict):
        missing, unknown = set(required) - set(arch), set(arch) - {*required, *optional}
        require(not missing, f'arch lacks {", ".join(sorted(missing))}')
        require(
            not unknown,
            f'arch has {", ".join(sorted(map(str, unknown)))}, which is none of '
            f'{", ".join([*required, *optional])}',
        )
        return arch
    if not isinstance(arch, str):
        raise TypeError(f'arch must be a name or a dict, not {arch!r}')
    require(
        arch in settings, f'arch {arch!r} is unknown; choose from {", ".join(settings)}'
    )
    return settings[arch]


def require_one_per_stage(**values: Sequence) -> None:
    """Raise :class:`ArchitectureError` unless all values have the same length."""
    *names, last = values
    lengths = [len(value) for value in values.values()]
    require(
        len(set(lengths)) == 1,
        f'{", ".join(names)} and {last} must have one entry for each stage, not {lengths}',
    )


def block_dilations(
    dilations: Sequence[int | Sequence[int]], num_blocks: Sequence[int]
) -> list[Sequence[int]]:
    """The dilation of every block of every stage.

    Args:
        dilations: That of each stage, or of each of its blocks.
        num_blocks: Number of blocks of each stage.

    Raises:
        ArchitectureError: If a stage has another number of them than of blocks.
    """
    every = []
    for count, dilation in zip(num_blocks, dilations, strict=True):
        every.append([dilation] * count if isinstance(dilation, int) else dilation)
        require(
            len(every[-1]) == count, f'dilations {dilation!r} of a stage of {count} blocks'
        )
    return every


#: How bodies start: Kaiming for convs, 1 for the weights of norms.
INIT_CFG = (
    dict(type='Kaiming', layer='Conv2d'),
    dict(type='Constant', val=1, layer=['_BatchNorm', 'GroupNorm']),
)


class ReparamBackbone(BaseModule):
    """The base of the backbones.

    A subclass names its stages in ``stages`` and sets ``out_indices``, says in
    :meth:`stem_modules` what is frozen before them, and calls ``self.train()`` at the end
    of its construction, so that freezing holds from then on. One whose ``stages`` are the
    modules themselves says in :meth:`stage_modules` what is frozen with them.

    Args:
        frozen_stages (int): Stages whose parameters and statistics stay as they are, the
            stem counted as stage 0. Default: -1, none.
        norm_eval (bool): Keep every batch norm in eval mode while training.
            Default: False.
        init_cfg (dict | list[dict], optional): Initialization. Default: None.
    """

    #: Says to ``mmrep.reparam.switch_to_deploy`` that the blocks inside are switched.
    walks_over_blocks = True

    def __init__(
        self,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        init_cfg: dict | Sequence[dict] | None = None,
    ) -> None:
        # mmengine takes several entries as a list only.
        super().__init__(list(init_cfg) if isinstance(init_cfg, tuple) else init_cfg)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval

    @property
    def deploy(self) -> bool:
        """Whether every block is one conv; there is at least one."""
        blocks = reparam_blocks(self).values()
        return bool(blocks) and all(getattr(b, 'deploy', False) for b in blocks)

    def stem_modules(self) -> list[nn.Module]:
        """What stands before the first stage. Default: nothing."""
        return []

    def stage_modules(self, index: int) -> list[nn.Module]:
        """What stage ``index``, from 0, consists of."""
        return [getattr(self, self.stages[index])]

    def run_stages(self, x: Tensor) -> tuple[Tensor, ...]:
        """The outputs of the stages in ``out_indices``, given the stem's."""
        outs = []
        for i, name in enumerate(self.stages):
            x = getattr(self, name)(x)
            if i in self.out_indices:
                outs.append(x)
        return tuple(outs)

    def train(self, mode: bool = True) -> 'ReparamBackbone':
        """Set the mode, but keep frozen stages and, with ``norm_eval``, norms in eval."""
        super().train(mode)
        if self.frozen_stages >= 0:
            stages = range(min(self.frozen_stages, len(self.stages)))
            frozen = chain.from_iterable(map(self.stage_modules, stages))
            for module in (*self.stem_modules(), *frozen):
                module.eval().requires_grad_(False)
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm) or has_running_statistics(module):
                    module.eval()
        return self

    def switch_to_deploy(self) -> None:
        """Turn every block into one conv; see :func:`mmrep.reparam.switch_to_deploy`."""
        switch_to_deploy(self)
