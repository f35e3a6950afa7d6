"""How the models of the hosts are run."""

from typing import Any

from mmengine.model import BaseModel
from torch import Tensor, nn


def forward(model: nn.Module, x: Tensor) -> Any:
    """The raw outputs of a model: ``mode='tensor'`` of mmengine's ``BaseModel``."""
    return model(x, mode='tensor') if isinstance(model, BaseModel) else model(x)
