"""Build the deploy form of a model that has no argument for it."""

from typing import Any

from mmengine.registry import MODELS as MMENGINE_MODELS
from torch import nn

from mmrep.registry import MODELS
from mmrep.reparam import switch_to_deploy


@MODELS.register_module(name='Deployed')
def build_deployed(of: str | type, **host: Any) -> nn.Module:
    """A model in deploy form, of its own class: ``type='mmrep.Deployed'``.

    It is built in train form, and its blocks switched, which is for models whose classes
    have blocks and take no ``deploy=True``, as networks of timm. Its weights are those of
    a deploy checkpoint, loaded next.

    Args:
        of: The type of the model.
        **host: Its arguments.

    Raises:
        ValueError: If there is no block in the model.
        NotFoldableError: If a block cannot be switched.
    """
    model = MMENGINE_MODELS.build(dict(host, type=of))
    if not switch_to_deploy(model).switched:
        raise ValueError(f'{of} has no block that can be switched: build it as it is')
    return model
