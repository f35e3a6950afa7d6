"""Run models of the hosts."""

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmengine.logging import MMLogger
from mmengine.model import BaseModel
from torch import nn


def forward(model: nn.Module, x: Any) -> Any:
    """The raw outputs of a model: ``mode='tensor'`` of mmengine's ``BaseModel``.

    For a detector that needs annotations even in this mode, as those of two stages do, the
    features of backbone and neck instead: ``extract_feat``.

    Args:
        model: Any model.
        x: Its input; for a neck or a head, the feature maps that it takes.
    """
    if not isinstance(model, BaseModel):
        return model(x)
    if _takes_annotations(model):
        return model.extract_feat(x)
    return model(x, mode='tensor')


def _takes_annotations(model: BaseModel) -> bool:
    # What mmdet's forward calls with mode='tensor'.
    tensor_mode = getattr(model, '_forward', None)
    if tensor_mode is None or not hasattr(model, 'extract_feat'):
        return False
    # In a transformer they have a default, but it fails without them.
    return hasattr(model, 'forward_transformer') or any(
        parameter.default is parameter.empty
        for parameter in [*inspect.signature(tensor_mode).parameters.values()][1:]
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the hosts' logs (tables of metrics, each weight's init), except errors."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
