"""What all backbones of mmrep share: freezing, norm_eval and the switch."""

from collections.abc import Mapping, Sequence
from itertools import chain

from mmengine.model import BaseModule
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import Tensor, nn

from mmrep.reparam import has_running_statistics, reparam_blocks, switch_to_deploy


class ArchitectureError(ValueError, AssertionError):
    """Arguments that do not describe a network.

    Also an ``AssertionError``, which mmpretrain and mmseg raise in this case.
    """


def require(condition: bool, message: str) -> None:
    """Raise :class:`ArchitectureError` with the message unless the condition holds."""
    if not condition:
        raise ArchitectureError(message)


def require_stages(out_indices: Sequence[int], num_stages: int) -> None:
    """Raise :class:`ArchitectureError` unless the indices are of different stages."""
    require(
        len(out_indices) > 0
        and all(0 <= index < num_stages for index in out_indices)
        and len(set(out_indices)) == len(out_indices),
        f'out_indices={tuple(out_indices)} of {num_stages} stages: name one or more of 0 '
        f'to {num_stages - 1}, each once',
    )


def stage_indices(out_indices: Sequence[int] | int, num_stages: int) -> tuple[int, ...]:
    """``out_indices`` as indices from 0; negative ones count from the end.

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
    """Look up an architecture by its name, or check one that is given as a dict.

    Args:
        arch: A name, or a dict.
        settings: The architectures by name.
        required, optional: The keys that a dict must and may have.

    Raises:
        TypeError: If ``arch`` is neither a name nor a dict.
        ArchitectureError: If the name is unknown, or the dict lacks a required key or has
            an unknown one.
    """
    if isinstance(arch, dict):
        missing, unknown = set(required) - set(arch), set(arch) - {*required, *optional}
        require(not missing, f'arch lacks {", ".join(sorted(missing))}')
        require(
            not unknown,
            f'arch has unknown keys: {", ".join(sorted(map(str, unknown)))}; known are '
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
        dilations: For each stage one dilation, or one for each of its blocks.
        num_blocks: Number of blocks of each stage.

    Raises:
        ArchitectureError: If the dilations of a stage are not as many as its blocks.
    """
    every = []
    for count, dilation in zip(num_blocks, dilations, strict=True):
        every.append([dilation] * count if isinstance(dilation, int) else dilation)
        require(
            len(every[-1]) == count,
            f'dilations {dilation!r} of a stage of {count} blocks: give one for each block',
        )
    return every


#: Default initialization of backbones: Kaiming for convs, 1 for the weights of norms.
INIT_CFG = (
    dict(type='Kaiming', layer='Conv2d'),
    dict(type='Constant', val=1, layer=['_BatchNorm', 'GroupNorm']),
)


class ReparamBackbone(BaseModule):
    """The base of the backbones.

    A subclass lists the names of its stages in ``stages`` and sets ``out_indices``. Its
    :meth:`stem_modules` returns the modules before the first stage, to be frozen before it.
    It calls ``self.train()`` at the end of ``__init__``, so that freezing takes effect. If
    ``stages`` holds the modules themselves, it overrides :meth:`stage_modules`.

    Args:
        frozen_stages (int): Number of stages to freeze, with the stem: parameters and
            running statistics stay as they are. 0 freezes the stem alone. Default: -1,
            none.
        norm_eval (bool): Keep every batch norm in eval mode while training.
            Default: False.
        init_cfg (dict | list[dict], optional): Initialization. Default: None.
    """

    #: Tells ``mmrep.reparam.switch_to_deploy`` to switch the blocks inside one by one.
    walks_over_blocks = True

    def __init__(
        self,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        init_cfg: dict | Sequence[dict] | None = None,
    ) -> None:
        # mmengine takes several entries only as a list.
        super().__init__(list(init_cfg) if isinstance(init_cfg, tuple) else init_cfg)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval

    @property
    def deploy(self) -> bool:
        """Whether there are blocks, and all of them are one conv."""
        blocks = reparam_blocks(self).values()
        return bool(blocks) and all(getattr(b, 'deploy', False) for b in blocks)

    def stem_modules(self) -> list[nn.Module]:
        """The modules before the first stage. Default: none."""
        return []

    def stage_modules(self, index: int) -> list[nn.Module]:
        """The modules of stage ``index``, from 0."""
        return [getattr(self, self.stages[index])]

    def run_stages(self, x: Tensor) -> tuple[Tensor, ...]:
        """The outputs of the stages in ``out_indices``; ``x`` is the stem's output."""
        outs = []
        for i, name in enumerate(self.stages):
            x = getattr(self, name)(x)
            if i in self.out_indices:
                outs.append(x)
        return tuple(outs)

    def train(self, mode: bool = True) -> 'ReparamBackbone':
        """Set the mode; frozen stages and, with ``norm_eval``, norms stay in eval mode."""
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
