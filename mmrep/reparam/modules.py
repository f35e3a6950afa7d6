"""Find and replace modules of a model by their names; one can have several."""

from torch import nn


def names_of(model: nn.Module) -> dict[nn.Module, list[str]]:
    """All names of each module in a model."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def set_submodule(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule of a name by ``module``."""
    owner, _, attribute = name.rpartition('.')
    setattr(model.get_submodule(owner), attribute, module)
