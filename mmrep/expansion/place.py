"""Where a block stands in the place of a conv: what the network around it finds there."""

from collections.abc import Iterator
from itertools import takewhile
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mmrep.models.blocks import ReparamBlock


class MovedNorm(nn.Identity):
    """Stands where a norm was that is in a block now.

    What a network does with its norm reaches the norms of the block: its mode, and how its
    weight and bias are initialized.

    Args:
        block: The block.
    """

    def __init__(self, block: ReparamBlock) -> None:
        super().__init__()
        # No child: its tensors are the block's.
        self.__dict__['block'] = block
        super().train(main_norm(block).training)

    @property
    def weight(self) -> Tensor | None:
        """The scale of the norm that was here; none in deploy form."""
        return None if self.block.deploy else main_norm(self.block).weight

    @property
    def bias(self) -> Tensor | None:
        """Its shift."""
        return None if self.block.deploy else main_norm(self.block).bias

    def train(self, mode: bool = True) -> 'MovedNorm':
        """The mode of all norms of the block, as of one norm in its place."""
        for part in self.block.linear_parts():
            part.train(mode)
        return super().train(mode)


class PlainKeys:
    """Hook before loading a state dict: what a plain network says of a conv and its norm.

    It goes into the main branch of the block that stands for them; the other branches
    start at a contribution of zero, as :meth:`ReparamBlock.from_conv` leaves them.

    Args:
        conv: The conv's name, in the module that has the conv and the norm; ``''`` where
            that is the block itself.
        norm: The norm's. Default: None, for none.
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
    """The norm in a block that was after the conv."""
    return block.get_submodule(block.main_norm_name())


def add_plain_keys(model: nn.Module, conv: str, norm: str | None = None) -> RemovableHandle:
    """Let a model load what a plain one says of a conv and its norm, by their names."""
    # A module loads what is below it: the hook belongs to what holds the two.
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
    """The hooks of a model, each with the module that it is on, and its key there."""
    for module in model.modules():
        for key, hook in list(module._load_state_dict_pre_hooks.items()):
            hook = getattr(hook, 'hook', hook)
            if isinstance(hook, PlainKeys):
                yield module, key, hook
