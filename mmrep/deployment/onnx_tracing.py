"""From a model to an ONNX graph, by torch's exporter."""

import inspect
import io
import warnings
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest import mock

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
    """Changes what the exporter would write down in a way that ONNX cannot compute.

    Adaptive pooling is written as matrix products. Unless sizes are dynamic, they are
    numbers instead of operators that compute them.
    """

    def __init__(self, dynamic: bool) -> None:
        super().__init__()
        self.dynamic = dynamic

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is F.adaptive_avg_pool2d and args[1] not in (1, (1, 1), [1, 1]):
            with self:
                return adaptive_average(*args)
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Size) and not self.dynamic:
            return torch.Size(int(size) for size in result)
        if func is Tensor.size and not self.dynamic:
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


@torch.no_grad()
def trace(
    model: nn.Module,
    references: list[Reference],
    form: str,
    dynamic: bool,
    opset: int,
    resize: Resize = unchanged,
) -> 'ModelProto':
    """The graph of a model, by the TorchScript-based exporter of torch 2.1 and later."""
    import onnx

    weights = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    if weights > _MAX_WEIGHTS:
        raise UserError(
            f'the weights take {weights:,} bytes, and an ONNX file holds 2 GiB: this '
            'model is too large to export'
        )
    axes = _dynamic_axes(references)
    mode = torch.onnx.TrainingMode
    options = dict(
        # With EVAL the exporter folds the norms of the branches into their convs.
        training=mode.EVAL if form == 'deploy' else mode.PRESERVE,
        opset_version=opset,
        input_names=['input'],
        output_names=list(references[0].outputs),
        dynamic_axes=axes if dynamic else None,
    )
    if 'dynamo' in inspect.signature(torch.onnx.export).parameters:
        options['dynamo'] = False
    buffer = io.BytesIO()
    # It would print the whole graph where it fails.
    silent = mock.patch.object(torch._C, '_jit_onnx_log', lambda *_: None, create=True)
    try:
        with warnings.catch_warnings(), silent, _Traceable(dynamic):
            warnings.simplefilter('ignore')
            outputs = _Outputs(model, resize).eval()
            torch.onnx.export(outputs, (references[0].x,), buffer, **options)
    except Exception as error:
        # The exporter and the model may raise anything.
        raise UserError(
            f'torch {torch.__version__} cannot write this model with opset {opset} '
            f'({reason(error)}): try another --opset'
            f'{", or leave --dynamic out" if dynamic else ""}'
        ) from error
    exported = onnx.load_model_from_string(buffer.getvalue())
    for value in exported.graph.output:
        # Some are beyond what the exporter infers.
        sizes = value.type.tensor_type.shape
        sizes.Clear()
        for axis, size in enumerate(references[0].outputs[value.name].shape):
            name = axes[value.name].get(axis)
            sizes.dim.add(**({'dim_param': name} if name else {'dim_value': size}))
    return exported


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
