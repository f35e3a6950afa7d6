"""What stands for a conv and its norm beside a block: a placeholder and a key mapping."""

from collections.abc import Iterator
from itertools import takewhile
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mmrep.models.blocks import ReparamBlock


class MovedNorm(nn.Identity):
    """Placeholder for a norm that was moved into a block.

    Its mode is passed on to the branches and norms of the block, and its weight and bias
    are those of the moved norm, so that the network can initialize them.

    Args:
        block: The block.
    """

    def __init__(self, block: ReparamBlock) -> None:
        super().__init__()
        # Not a child module, which would add the block's tensors to the state dict twice.
        self.__dict__['block'] = block
        super().train(main_norm(block).training)

    @property
    def weight(self) -> Tensor | None:
        """The weight of the moved norm; ``None`` in deploy form."""
        return None if self.block.deploy else main_norm(self.block).weight

    @property
    def bias(self) -> Tensor | None:
        """The bias of the moved norm; ``None`` in deploy form."""
        return None if self.block.deploy else main_norm(self.block).bias

    def train(self, mode: bool = True) -> 'MovedNorm':
        """Set the mode of the block's branches and norms, as that of one norm."""
        for part in self.block.linear_parts():
            part.train(mode)
        return super().train(mode)


class PlainKeys:
    """Hook before loading a state dict: moves a plain conv's and norm's keys to a block's.

    Their tensors go into the main branch of the block; the other branches start with a
    contribution of zero, as :meth:`ReparamBlock.from_conv` leaves them.

    Args:
        conv: The conv's name, relative to the module that holds the conv and the norm;
            ``''`` if that is the block itself.
        norm: The norm's name, likewise. Default: None, no norm.
    """

    def __init__(self, conv: str, norm: str | None = None) -> None:
        self.conv = conv
        self.norm = norm

    def __call__(
        self, owner: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        block = owner.get_submodule(self.conv)
        conv = f'{prefix}{self.conv}.' if self.conv else prefix
        if f'{conv}weight' not in state_dict or block.deploy:
            return
        main = f'{conv}{block.main_conv_name()}.'
        for name in list(state_dict):
            if name in (f'{conv}weight', f'{conv}bias'):
                state_dict[f'{main}{name.removeprefix(conv)}'] = state_dict.pop(name)
            elif self.norm and name.startswith(norm := f'{prefix}{self.norm}.'):
                moved = f'{conv}{block.main_norm_name()}.{name.removeprefix(norm)}'
                state_dict[moved] = state_dict.pop(name)
        if (fixed := block.fixed_kernel()) is not None:
            weight = state_dict[f'{main}weight']
            state_dict[f'{main}weight'] = weight - fixed.to(weight)
        for name, tensor in block.start_of_others().items():
            state_dict.setdefault(f'{conv}{name}', tensor)


def main_norm(block: ReparamBlock) -> nn.Module:
    """The norm in a block that stands for the norm after the conv."""
    return block.get_submodule(block.main_norm_name())


def add_plain_keys(model: nn.Module, conv: str, norm: str | None = None) -> RemovableHandle:
    """Let a model load a plain network's tensors of a conv and its norm into a block."""
    # A hook sees the keys below its module: it belongs to the module that holds both.
    *owner, _ = conv.split('.')
    if norm is not None:
        shared = zip(owner, norm.split('.')[:-1], strict=False)
        owner = [a for a, _ in takewhile(lambda names: names[0] == names[1], shared)]
    module = model.get_submodule('.'.join(owner))
    names = [
        '.'.join(name.split('.')[len(owner) :]) for name in (conv, norm) if name is not None
    ]
    return module._register_load_state_dict_pre_hook(PlainKeys(*names), with_module=True)


def places(model: nn.Module) -> Iterator[tuple[nn.Module, int, PlainKeys]]:
    """The ``PlainKeys`` hooks of a model: the module of each, its key there, the hook."""
    for module in model.modules():
        for key, hook in list(module._load_state_dict_pre_hooks.items()):
            hook = getattr(hook, 'hook', hook)
            if isinstance(hook, PlainKeys):
                yield module, key, hook
