"""Evaluate raw outputs of any origin as the host evaluates its model."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.registry import EVALUATOR
from mmengine.runner import Runner
from torch import Tensor, nn

from mmrep.deployment.running import run_form, seeded_input
from mmrep.errors import ConfigError, UserError
from mmrep.hosts import quiet

from .progress import Track, untracked

#: Names of the head in the hosts' classifiers and segmentors.
_HEADS = ('head', 'decode_head')

#: Metrics to look at if an evaluator gives several and the config names none.
_USUAL = ('accuracy/top1', 'mIoU', 'multi-label/mAP')

#: Metrics of which less is better, as mmengine, mmseg and mmdet call them.
_LESS = re.compile(r'(^|[/_])(loss|rmse|mse|mae|abs_rel|sq_rel|log10|silog|error)')

#: From a batch of preprocessed images to raw outputs.
Infer = Callable[[Tensor], Tensor]


class HostEvaluation:
    """The validation set, the evaluator and the post-processing of a config.

    Args:
        config: The config, with ``val_dataloader`` and ``val_evaluator``.
        model: Its model, for which ``has_one_head`` is true. Its weights do not matter.
        metric: Name of the metric that decides, one that the evaluator gives. Default: the
            one that ``default_hooks.checkpoint.save_best`` names, else ``accuracy/top1``,
            ``mIoU`` or ``multi-label/mAP``, else the only one.

    Raises:
        ConfigError: If the config lacks one of them.
    """

    def __init__(self, config: Config, model: nn.Module, metric: str | None = None) -> None:
        for name in ('val_dataloader', 'val_evaluator'):
            if not config.get(name):
                raise ConfigError(
                    f'this config has no {name}, by which the loss of int8 is measured: '
                    'give a config with one'
                )
        self.model = model
        self.loader = Runner.build_dataloader(config.val_dataloader)
        self._evaluator = config.val_evaluator
        self._metric = metric
        self._named, self._rule = _save_best(config)

    def measure(
        self, infer: Infer, form: str = '', track: Track = untracked
    ) -> dict[str, float]:
        """The metrics of raw outputs on the validation set.

        Args:
            infer: Computes the raw outputs.
            form: Name of the form, for the progress. Default: ''.
            track: Wraps the batches, with a title. Default: nothing is shown.
        """
        with quiet():
            evaluator = _built(self._evaluator)
        evaluator.dataset_meta = getattr(self.loader.dataset, 'metainfo', None)
        with _predicting(self.model, infer), torch.no_grad():
            for data in track(self.loader, f'evaluating {form}'):
                evaluator.process(self.model.val_step(data), data)
        with quiet():
            metrics = evaluator.evaluate(len(self.loader.dataset))
        return {name: float(value) for name, value in metrics.items() if _is_number(value)}

    def metric_of(self, metrics: dict[str, float]) -> str:
        """The name of the metric that decides.

        Raises:
            UserError: If the evaluator does not give it, or gives several and none of them
                is named.
        """
        given = ', '.join(metrics) or 'none that is a number'
        if self._metric is not None:
            if self._metric not in metrics:
                raise UserError(
                    f'the evaluator gives no {self._metric}: choose --metric from {given}'
                )
            return self._metric
        names = [name for name in (self._named, *_USUAL) if name in metrics]
        if not names and len(metrics) == 1:
            names = list(metrics)
        if not names:
            raise UserError(f'the evaluator gives {given}: choose one by --metric')
        return names[0]

    def less_is_better(self, metric: str) -> bool:
        """Whether less of a metric is better, by the config's rule or by its name.

        The rule is that of the checkpoint hook, if it is a single one and ``save_best`` is
        this metric or ``'auto'``.
        """
        if self._rule in ('less', 'greater') and self._named in (metric, 'auto'):
            return self._rule == 'less'
        return bool(_LESS.search(metric))

    def inputs_of(self, data: dict, infer: Infer) -> list[np.ndarray]:
        """The inputs of the network for a batch, ``(1, C, H, W)`` each: images, or crops.

        Args:
            data: The batch, as a data loader gives it.
            infer: Computes raw outputs.
        """
        seen = []

        def spy(inputs: Tensor) -> Tensor:
            seen.extend(inputs.split(1))
            return infer(inputs)

        with _predicting(self.model, spy), torch.no_grad():
            self.model.val_step(data)
        return [image.numpy() for image in seen]


def _built(config: dict | list) -> Evaluator:
    if isinstance(config, dict) and 'metrics' in config:
        return EVALUATOR.build({'type': 'Evaluator', **config})
    return Evaluator(config)


def _save_best(config: Config) -> tuple[str | None, str | None]:
    """The ``save_best`` and the ``rule`` of the config's checkpoint hook."""
    hooks = config.get('default_hooks')
    checkpoint = hooks.get('checkpoint') if isinstance(hooks, dict) else None
    checkpoint = checkpoint if isinstance(checkpoint, dict) else {}
    best = checkpoint.get('save_best')
    return best if isinstance(best, str) else None, checkpoint.get('rule')


def _is_number(value: object) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


@torch.no_grad()
def has_one_head(model: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether a model's raw output is one tensor, which its one head returns.

    This holds for classifiers and segmentors. They can predict from raw outputs that
    something else has computed.

    Args:
        model: The model.
        shape: Shape of an input.

    Raises:
        UserError: If the model cannot process the input.
    """
    if (head := _head_of(model)) is None:
        return False
    returned, original = [], head.forward

    def spy(*args: Any, **kwargs: Any) -> Any:
        returned.append(original(*args, **kwargs))
        return returned[-1]

    head.forward = spy
    try:
        output = run_form(model, seeded_input(shape, 0), 'train')
    finally:
        del head.forward
    return isinstance(output, Tensor) and [output is y for y in returned] == [True]


def _head_of(model: nn.Module) -> nn.Module | None:
    heads = [getattr(model, name, None) for name in _HEADS]
    heads = [head for head in heads if isinstance(head, nn.Module)]
    fits = len(heads) == 1 and hasattr(model, 'extract_feat')
    return heads[0] if fits and hasattr(heads[0], 'predict') else None


@contextmanager
def _predicting(model: nn.Module, infer: Infer) -> Iterator[None]:
    """Let a model predict from the raw outputs of ``infer`` instead of its own."""
    head = _head_of(model)
    model.extract_feat = lambda inputs, *args, **kwargs: infer(inputs)
    head.forward = lambda outputs: outputs
    try:
        yield
    finally:
        # The methods of the classes are visible again.
        del model.extract_feat, head.forward
