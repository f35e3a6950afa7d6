"""From a model to an ONNX graph, by an exporter of torch."""

import inspect
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmrep.errors import UserError, reason
from mmrep.hosts import forward
from mmrep.reparam import flatten_outputs

from .onnx_verification import Reference

if TYPE_CHECKING:
    # Imported where they are needed: mmrep works without them.
    from onnx import ModelProto

#: A protobuf, and so an ONNX file, holds 2 GiB; the rest is for the graph.
_MAX_WEIGHTS = 2**31 - 2**24

#: The opset that an exporter writes unless told otherwise.
OPSETS = {'torch.export': 18, 'TorchScript': 17}


#: What is done to the outputs for an input before they leave the graph.
Resize = Callable[[dict[str, Tensor], Tensor], dict[str, Tensor]]


def unchanged(outputs: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """Outputs as they are."""
    return outputs


def resized(
    outputs: dict[str, Tensor], x: Tensor, align_corners: bool
) -> dict[str, Tensor]:
    """Maps resized to the height and width of the input, as mmseg resizes logits."""
    resize = partial(
        F.interpolate, size=x.shape[2:], mode='bilinear', align_corners=align_corners
    )
    return {name: resize(y) if y.ndim == 4 else y for name, y in outputs.items()}


class _Outputs(nn.Module):
    """A model with one input and a tuple of tensors for its output."""

    def __init__(self, model: nn.Module, resize: Resize) -> None:
        super().__init__()
        self.model, self.resize = model, resize

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        outputs = flatten_outputs(forward(self.model, x))
        return tuple(self.resize(outputs, x).values())


class _Traceable(TorchFunctionMode):
    """Replaces what an exporter would write in a way that ONNX cannot compute.

    Adaptive pooling becomes matrix products.

    Args:
        numbers: Whether sizes become numbers, rather than operators that compute them.
    """

    def __init__(self, numbers: bool) -> None:
        super().__init__()
        self.numbers = numbers

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is F.adaptive_avg_pool2d and args[1] not in (1, (1, 1), [1, 1]):
            with self:
                return adaptive_average(*args)
        result = func(*args, **(kwargs or {}))
        if self.numbers and isinstance(result, torch.Size):
            return torch.Size(int(size) for size in result)
        if self.numbers and func is Tensor.size:
            return int(result)
        return result


def adaptive_average(x: Tensor, output_size: int | tuple[int | None, ...]) -> Tensor:
    """``F.adaptive_avg_pool2d`` as two matrix products, which take every size.

    Bin ``i`` of ``n`` averages the pixels from ``floor(i size / n)`` to
    ``ceil((i + 1) size / n)``.
    """
    if not isinstance(output_size, tuple | list):
        output_size = (output_size, output_size)
    for axis, bins in zip((2, 3), output_size, strict=True):
        if bins is None:
            continue
        size = x.shape[axis]
        index = torch.arange(bins, device=x.device)
        start, stop = index * size // bins, ((index + 1) * size + bins - 1) // bins
        pixel = torch.arange(size, device=x.device)
        inside = (pixel >= start[:, None]) & (pixel < stop[:, None])
        weights = inside.to(x.dtype) / (stop - start).to(x.dtype)[:, None]
        x = weights @ x if axis == 2 else x @ weights.t()
    return x


def exporters(opset: int | None) -> list[str]:
    """The exporters of the installed torch that may write an opset, the best first.

    ``'torch.export'`` writes opset 18 and later, in torch 2.6 and later. Of it,
    ``'TorchScript'`` is the deprecated predecessor, which takes what does not pass
    ``torch.export``.
    """
    parameters = inspect.signature(torch.onnx.export).parameters
    supported = {'dynamo', 'optimize'} <= parameters.keys()
    if supported and (opset is None or opset >= OPSETS['torch.export']):
        return ['torch.export', 'TorchScript']
    return ['TorchScript']


@torch.no_grad()
def trace(
    exporter: str,
    model: nn.Module,
    references: list[Reference],
    form: str,
    dynamic: bool,
    opset: int | None = None,
    resize: Resize = unchanged,
) -> 'ModelProto':
    """The graph of a model, by one of the :func:`exporters`.

    Raises:
        UserError: If the exporter fails, or the model is too large for a file.
    """
    weights = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    if weights > _MAX_WEIGHTS:
        raise UserError(
            f'the weights take {weights:,} bytes, and an ONNX file holds 2 GiB: this '
            'model is too large to export'
        )
    opset = opset or OPSETS[exporter]
    export = _by_torch_export if exporter == 'torch.export' else _by_torchscript
    axes = _dynamic_axes(references)
    options = dict(
        input_names=['input'], output_names=list(references[0].outputs), opset_version=opset
    )
    try:
        with _silence():
            outputs = _Outputs(model, resize).eval()
            exported = export(outputs, references[0].x, form, axes, dynamic, options)
    except Exception as error:
        # The exporter and the model may raise anything.
        raise UserError(
            f'torch {torch.__version__} cannot write this model with opset {opset} '
            f'({reason(error)}): try another --opset'
            f'{", or leave --dynamic out" if dynamic else ""}'
        ) from error
    # Some sizes are beyond what an exporter infers.
    for value in (*exported.graph.input, *exported.graph.output):
        tensor = {'input': references[0].x, **references[0].outputs}[value.name]
        sizes = value.type.tensor_type.shape
        sizes.Clear()
        for axis, size in enumerate(tensor.shape):
            name = axes[value.name].get(axis) if dynamic else None
            sizes.dim.add(**({'dim_param': name} if name else {'dim_value': size}))
    return exported


def _by_torch_export(
    outputs: nn.Module,
    x: Tensor,
    form: str,
    axes: dict[str, dict[int, str]],
    dynamic: bool,
    options: dict[str, Any],
) -> 'ModelProto':
    # Each size is a symbol of its own: the names in the file are given later.
    sizes = dict.fromkeys(axes['input'], getattr(torch.export.Dim, 'DYNAMIC', None))
    with _Traceable(numbers=False):
        program = torch.onnx.export(
            outputs,
            (x,),
            dynamo=True,
            dynamic_shapes=(sizes,) if dynamic else None,
            external_data=False,
            # It folds the norms of the branches into their convs.
            optimize=form == 'deploy',
            verbose=False,
            **options,
        )
    exported = program.model_proto
    written = next(o.version for o in exported.opset_import if not o.domain)
    if written != options['opset_version']:
        raise ValueError(f'it writes opset {written} instead')
    return exported


def _by_torchscript(
    outputs: nn.Module,
    x: Tensor,
    form: str,
    axes: dict[str, dict[int, str]],
    dynamic: bool,
    options: dict[str, Any],
) -> 'ModelProto':
    import onnx

    if 'dynamo' in inspect.signature(torch.onnx.export).parameters:
        options['dynamo'] = False
    mode = torch.onnx.TrainingMode
    buffer = io.BytesIO()
    with _Traceable(numbers=not dynamic), _no_output():
        torch.onnx.export(
            outputs,
            (x,),
            buffer,
            # With EVAL the exporter folds the norms of the branches into their convs.
            training=mode.EVAL if form == 'deploy' else mode.PRESERVE,
            dynamic_axes=axes if dynamic else None,
            **options,
        )
    return onnx.load_model_from_string(buffer.getvalue())


@contextmanager
def _no_output() -> Iterator[None]:
    """Drop what is written to standard output by C++: a whole graph, after a failure."""
    sys.stdout.flush()
    stdout = os.dup(1)
    try:
        with open(os.devnull, 'w') as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


@contextmanager
def _silence() -> Iterator[None]:
    """Hide warnings and logs of an exporter: what it writes is verified."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.ERROR))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.disable(before)


def _dynamic_axes(references: list[Reference]) -> dict[str, dict[int, str]]:
    """The axes that are not as long for every reference."""
    axes = {'input': {0: 'batch', 2: 'height', 3: 'width'}}
    for name in references[0].outputs:
        shapes = [reference.outputs[name].shape for reference in references]
        axes[name] = {
            axis: f'{name}_{axis}' if axis else 'batch'
            for axis, sizes in enumerate(zip(*shapes, strict=True))
            if len(set(sizes)) > 1
        }
    return axes
