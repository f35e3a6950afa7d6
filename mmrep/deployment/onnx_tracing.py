"""From a model to an ONNX graph, by an exporter of torch."""

import inspect
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmrep.errors import UserError, reason
from mmrep.hosts import forward
from mmrep.reparam import flatten_outputs

from .onnx_graph import fold_constants, name_nodes
from .onnx_verification import Reference

if TYPE_CHECKING:
    # Imported where they are needed: mmrep works without them.
    from onnx import ModelProto

#: Limit on the bytes of weights: a file holds 2 GiB, of which 16 MiB are for the graph.
_MAX_WEIGHTS = 2**31 - 2**24

#: The opset that an exporter writes unless told otherwise.
_OPSETS = {'torch.export': 18, 'TorchScript': 17}

#: The names of the axes that vary, by the name of the input or output.
_Axes = dict[str, dict[int, str]]

#: A function of the outputs and the input, applied at the end of the graph.
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


class ExportError(UserError):
    """An exporter failed."""


class _Outputs(nn.Module):
    """A model with one input and a tuple of tensors for its output."""

    def __init__(self, model: nn.Module, resize: Resize) -> None:
        super().__init__()
        self.model, self.resize = model, resize

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        outputs = flatten_outputs(forward(self.model, x))
        return tuple(self.resize(outputs, x).values())


class _Traceable(TorchFunctionMode):
    """Replaces adaptive pooling, which no exporter writes for every size, by products.

    Args:
        numbers: Whether to replace sizes by numbers, rather than export operators that
            compute them.
    """

    def __init__(self, numbers: bool) -> None:
        super().__init__()
        self.numbers = numbers

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        # torch hands both arguments on by position.
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

    ``'torch.export'`` needs torch 2.6 or newer, and writes opset 18 and later.
    ``'TorchScript'`` is its deprecated predecessor, which also writes older opsets, and
    models that ``torch.export`` cannot trace.
    """
    parameters = inspect.signature(torch.onnx.export).parameters
    supported = {'dynamo', 'optimize'} <= parameters.keys()
    if supported and (opset is None or opset >= _OPSETS['torch.export']):
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
        ExportError: If the exporter fails.
        UserError: If the model is too large for a file.
    """
    weights = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    if weights > _MAX_WEIGHTS:
        raise UserError(
            f'the weights take {weights:,} bytes, and an ONNX file holds 2 GiB: this '
            'model is too large to export'
        )
    opset = opset or _OPSETS[exporter]
    export = _by_torch_export if exporter == 'torch.export' else _by_torchscript
    axes = _dynamic_axes(references) if dynamic else {}
    options = dict(
        input_names=['input'], output_names=list(references[0].outputs), opset_version=opset
    )
    try:
        with _silence():
            outputs = _Outputs(model, resize).eval()
            exported = export(outputs, references[0].x, form, axes, **options)
            fold_constants(exported)
            name_nodes(exported)
    except Exception as error:
        # The exporters and the model may raise anything. An error of torch.export begins
        # with advice to its developers; its cause is the reason.
        cause = error.__cause__ if exporter == 'torch.export' else None
        raise ExportError(
            f'torch {torch.__version__} cannot write this model with opset {opset} '
            f'({reason(cause or error)}): nothing was written; try another --opset'
            f'{", or leave --dynamic out" if dynamic else ""}'
        ) from error
    # Some sizes are beyond what an exporter infers.
    for value in (*exported.graph.input, *exported.graph.output):
        tensor = {'input': references[0].x, **references[0].outputs}[value.name]
        sizes = value.type.tensor_type.shape
        sizes.Clear()
        for axis, size in enumerate(tensor.shape):
            name = axes.get(value.name, {}).get(axis)
            sizes.dim.add(**({'dim_param': name} if name else {'dim_value': size}))
    return exported


def _by_torch_export(
    outputs: nn.Module, x: Tensor, form: str, axes: _Axes, **options: Any
) -> 'ModelProto':
    sizes = None
    if axes:
        # Each dynamic axis is independent; trace() names the axes in the file.
        sizes = (dict.fromkeys(axes['input'], torch.export.Dim.DYNAMIC),)
    with _Traceable(numbers=False):
        program = torch.onnx.export(
            outputs,
            (x,),
            dynamo=True,
            dynamic_shapes=sizes,
            external_data=False,
            # It would fold the norms of branches into their convs in the train form.
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
    outputs: nn.Module, x: Tensor, form: str, axes: _Axes, **options: Any
) -> 'ModelProto':
    import onnx

    if 'dynamo' in inspect.signature(torch.onnx.export).parameters:
        options['dynamo'] = False
    mode = torch.onnx.TrainingMode
    buffer = io.BytesIO()
    with _Traceable(numbers=not axes), _no_output():
        torch.onnx.export(
            outputs,
            (x,),
            buffer,
            # With EVAL the exporter folds the norms of the branches into their convs.
            training=mode.EVAL if form == 'deploy' else mode.PRESERVE,
            dynamic_axes=axes or None,
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
    """Hide what an exporter warns of, logs and prints: what it writes is verified."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.ERROR))
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.disable(before)


def _dynamic_axes(references: list[Reference]) -> _Axes:
    """The names of the axes that vary, by the name of the input or output.

    An output's axis varies if its length differs between the references.
    """
    axes = {'input': {0: 'batch', 2: 'height', 3: 'width'}}
    for name in references[0].outputs:
        shapes = [reference.outputs[name].shape for reference in references]
        axes[name] = {
            axis: f'{name}_{axis}' if axis else 'batch'
            for axis, sizes in enumerate(zip(*shapes, strict=True))
            if len(set(sizes)) > 1
        }
    return axes
