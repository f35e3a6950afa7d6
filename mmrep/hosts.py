"""How the models of the hosts are run."""

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

    The features of a detector that takes an image's annotations even there, as those of
    two stages do: ``extract_feat`` of backbone and neck.

    Args:
        model: Any model.
        x: Its input, or several maps where it reads these, as a neck or a head.
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
    # A transformer has a default for them, and fails without.
    return hasattr(model, 'forward_transformer') or any(
        parameter.default is parameter.empty
        for parameter in [*inspect.signature(tensor_mode).parameters.values()][1:]
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Hide what the hosts log, but for errors: tables of metrics, each weight's init."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
