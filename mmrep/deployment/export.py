"""From a config and a checkpoint to an ONNX file, verified with ONNX Runtime."""

import inspect
import io
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from mmengine.config import Config
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmrep.checkpoints import (
    atomic_write,
    is_deploy_form,
    load_strictly,
    plain,
    read_checkpoint,
    refuse_existing,
    sha256_of,
    state_dict_of,
)
from mmrep.errors import CheckpointError, UserError, reason
from mmrep.reparam import (
    Difference,
    NotFoldableError,
    branch_by_branch,
    compare_tensors,
    conv_geometry,
    flatten_outputs,
    reparam_blocks,
    switch_to_deploy,
)
from mmrep.version import __version__

from .building import build_model
from .config import Shape, deploy_config, input_shape
from .convert import VerificationError, _run, _seeded_input, forward

if TYPE_CHECKING:
    # Imported where they are needed: mmrep works without them.
    from onnx import ModelProto, NodeProto

#: A protobuf, and so an ONNX file, holds 2 GiB; the rest is for the graph.
_MAX_WEIGHTS = 2**31 - 2**24

#: The inputs that are compared: images, and rows and columns more than asked for.
_FIXED = ((1, 0, 0), (1, 0, 0), (1, 0, 0))
_DYNAMIC = ((2, 0, 0), (1, 32, 64), (3, 33, 1))


class Reference(NamedTuple):
    """An input, and what the checkpoint's model makes of it, by the output's name."""

    x: Tensor
    outputs: dict[str, Tensor]


@dataclass(frozen=True)
class OnnxExport:
    """What :func:`export_onnx` did.

    Args:
        out: The file.
        size: Its bytes.
        blocks: Number of re-parameterizable blocks.
        comparisons: The shape of each input that was compared, and how far each output
            of the file is from that of the checkpoint's model.
        operators: How often each operator stands in the graph, the most frequent first.
    """

    out: Path
    size: int
    blocks: int
    comparisons: list[tuple[tuple[int, ...], dict[str, Difference]]]
    operators: dict[str, int]


def export_onnx(
    config: Config,
    checkpoint: str | Path,
    out: str | Path,
    form: str = 'deploy',
    dynamic: bool = False,
    opset: int = 17,
    shape: Shape | None = None,
    rtol: float = 1e-4,
    overwrite: bool = False,
    source_config: str | Path = '',
) -> OnnxExport:
    """Write a model's raw outputs as an ONNX graph that ONNX Runtime computes the same.

    The graph of the train form has all that a block computes in training: each branch,
    and a node for each of its convs and norms. In that of the deploy form the norms
    outside the blocks are folded, too. What does not depend on the input is computed
    once, here, so that an operator in the graph is one that works on the input.

    What the file is compared with is the model as the checkpoint has it; one in train
    form computes branch by branch in PyTorch, whichever form is exported.

    Args:
        config: The config that the checkpoint was trained with, or its deploy config.
        checkpoint: The checkpoint. One in train form is fused for ``form='deploy'``.
        out: The file to write.
        form: ``'deploy'`` or ``'train'``. Default: ``'deploy'``.
        dynamic: Whether the graph takes every batch size, height and width.
            Default: False, one image of one size.
        opset: Version of ONNX's operators. Default: 17.
        shape: Channels, height and width of the input. Default: the config's.
        rtol: The largest relative L2 error allowed. Default: 1e-4.
        overwrite: Whether to replace an existing file. Default: False.
        source_config: Name of the config, for the record. Default: ''.

    Raises:
        UserError: With one sentence, if anything is wrong; then nothing is written.
    """
    out = Path(out)
    if out.suffix != '.onnx':
        raise UserError(f'{out} must end in .onnx')
    refuse_existing(out, overwrite=overwrite)
    try:
        import onnx
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"exporting needs onnx and onnxruntime ({error}): pip install 'mmrep[onnx]'"
        ) from None

    model, given = _load(config, checkpoint, form)
    if dynamic:
        _refuse_same_padding(model)
    with branch_by_branch(model):
        references = _references(model, given, shape or input_shape(config), dynamic)
        if form == 'deploy':
            _fuse(model)
        exported = _trace(model, references, form, dynamic, opset)
    _fold_constants(exported)
    properties = {
        'version': __version__,
        'form': form,
        'source': Path(checkpoint).name,
        'source_sha256': sha256_of(checkpoint),
        'source_config': Path(source_config).name,
        # What the input has gone through before.
        'data_preprocessor': plain(
            config.model.get('data_preprocessor') or config.get('data_preprocessor')
        ),
    }
    onnx.helper.set_model_props(exported, {'mmrep': json.dumps(properties)})
    with atomic_write(out) as temporary:
        onnx.save(exported, temporary)
        comparisons = _verify(temporary, references, rtol)
    operators = Counter(node.op_type for node in _nodes(exported.graph.node))
    return OnnxExport(
        out,
        out.stat().st_size,
        len(reparam_blocks(model)),
        comparisons,
        dict(operators.most_common()),
    )


def _load(config: Config, checkpoint: str | Path, form: str) -> tuple[nn.Module, str]:
    """The model of a checkpoint and the form that it is in."""
    state_dict = state_dict_of(read_checkpoint(checkpoint), checkpoint)
    given = 'deploy' if is_deploy_form(state_dict) else 'train'
    if given == 'deploy':
        if form == 'train':
            raise CheckpointError(
                f'{checkpoint} is in deploy form and has no branches any more: export it '
                'with --form deploy, or give the checkpoint that it was fused from'
            )
        config = deploy_config(config)
    model = build_model(config)
    load_strictly(model, state_dict, checkpoint)
    return model, given


def _fuse(model: nn.Module) -> None:
    try:
        switch_to_deploy(model)
    except NotFoldableError as error:
        raise UserError(
            f'this model cannot be fused: {error}; export it with --form train'
        ) from None


def _refuse_same_padding(model: nn.Module) -> None:
    """Raise a ``UserError`` if a conv's padding depends on the size of its input."""
    for name, module in model.named_modules():
        try:
            depends = conv_geometry(module).padding_mode == 'same'
        except NotFoldableError:
            continue
        if depends:
            raise UserError(
                f"{name} pads by the size of its input ('SAME'), which is fixed in a "
                'graph: export one file for each size, without --dynamic'
            )


def _references(
    model: nn.Module, form: str, shape: Shape, dynamic: bool
) -> list[Reference]:
    """What a model of a form computes; the first input is of the shape asked for."""
    channels, height, width = shape
    references = []
    for seed, (images, rows, columns) in enumerate(_DYNAMIC if dynamic else _FIXED):
        x = _seeded_input((images, channels, height + rows, width + columns), seed)
        try:
            outputs = flatten_outputs(_run(model, x, form))
        except UserError:
            if not references:
                raise
            # A model that takes multiples of 32 pixels only is asked for no others.
            continue
        references.append(
            Reference(x, {re.sub(r'\W+', '_', k).strip('_'): v for k, v in outputs.items()})
        )
    if not references[0].outputs:
        raise UserError('the model returns no tensor: there is nothing to export')
    if dynamic and len(references) == 1:
        raise UserError(
            f'the model takes no other size than {height}x{width}: leave --dynamic out'
        )
    return references


class _Outputs(nn.Module):
    """A model with one input and a tuple of tensors for its output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(flatten_outputs(forward(self.model, x)).values())


class _Traceable(TorchFunctionMode):
    """Changes what the exporter would write down in a way that ONNX cannot compute.

    Adaptive pooling is written as matrix products. Unless sizes are dynamic, they are
    numbers instead of operators that compute them.
    """

    def __init__(self, dynamic: bool) -> None:
        super().__init__()
        self.dynamic = dynamic

    def __torch_function__(self, func, types, args=(), kwargs=None) -> Any:
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
def _trace(
    model: nn.Module,
    references: list[Reference],
    form: str,
    dynamic: bool,
    opset: int,
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
            torch.onnx.export(_Outputs(model).eval(), (references[0].x,), buffer, **options)
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


def _fold_constants(exported: 'ModelProto') -> None:
    """Compute what does not depend on the input, in place."""
    from onnx import TensorProto, ValueInfoProto, helper, numpy_helper
    from onnx.reference import ReferenceEvaluator

    graph = exported.graph
    shapes = _fixed_shapes(exported)
    known = {tensor.name for tensor in graph.initializer}
    constant, kept = [], []
    # They stand in the order of computation.
    for node in graph.node:
        if node.op_type == 'Shape' and node.input[0] in shapes and not node.attribute:
            sizes, name = shapes[node.input[0]], node.output[0]
            graph.initializer.append(
                helper.make_tensor(name, TensorProto.INT64, [len(sizes)], sizes)
            )
            known.add(name)
        elif all(name in known for name in node.input if name) and not any(
            attribute.HasField('g') for attribute in node.attribute
        ):
            constant.append(node)
            known.update(node.output)
        else:
            kept.append(node)
    read = _names_read(kept) | {value.name for value in graph.output}
    results = [name for node in constant for name in node.output if name in read]
    inside = _names_read(constant)
    model = helper.make_model(
        helper.make_graph(
            constant,
            'constants',
            inputs=[],
            outputs=[ValueInfoProto(name=name) for name in results],
            initializer=[tensor for tensor in graph.initializer if tensor.name in inside],
        ),
        opset_imports=exported.opset_import,
    )
    values = ReferenceEvaluator(model).run(None, {})
    initializers = [
        *(tensor for tensor in graph.initializer if tensor.name in read),
        *map(numpy_helper.from_array, values, results),
    ]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(kept)
    graph.initializer.extend(initializers)


def _fixed_shapes(exported: 'ModelProto') -> dict[str, list[int]]:
    """The shapes of the values in a graph that do not depend on the input's."""
    from onnx.shape_inference import infer_shapes

    graph = infer_shapes(exported, data_prop=True).graph
    return {
        value.name: [size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.value_info)
        if value.type.tensor_type.HasField('shape')
        and all(size.HasField('dim_value') for size in value.type.tensor_type.shape.dim)
    }


def _nodes(nodes: Iterable['NodeProto']) -> Iterator['NodeProto']:
    """The nodes and those of the graphs inside them."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            yield from _nodes(attribute.g.node)


def _names_read(nodes: Iterable['NodeProto']) -> set[str]:
    return {name for node in _nodes(nodes) for name in node.input}


def _verify(
    path: Path, references: list[Reference], rtol: float
) -> list[tuple[tuple[int, ...], dict[str, Difference]]]:
    """Check a file and compare its outputs.

    Raises:
        VerificationError: If it is no valid graph, cannot be run, or an output is not
            within ``rtol`` of its reference.
    """
    import onnx
    import onnxruntime

    try:
        onnx.checker.check_model(str(path), full_check=True)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(
            str(path), options, providers=['CPUExecutionProvider']
        )
    except Exception as error:
        raise VerificationError(
            f'ONNX Runtime cannot load the exported graph ({reason(error)}): nothing was '
            'written; try another --opset, or a model without operators of its own'
        ) from error
    comparisons = []
    for x, outputs in references:
        shape = tuple(x.shape)
        remedy = (
            'try another --opset, or report the config'
            if x.shape == references[0].x.shape
            else 'leave --dynamic out'
        )
        try:
            results = session.run(list(outputs), {'input': x.numpy()})
            differences = {
                name: compare_tensors(output, torch.from_numpy(result))
                for (name, output), result in zip(outputs.items(), results, strict=True)
            }
        except Exception as error:
            raise VerificationError(
                f'the exported graph fails on an input of shape {shape} '
                f'({reason(error)}): nothing was written; {remedy}'
            ) from error
        for name, difference in differences.items():
            if not difference.rel_l2 <= rtol:
                raise VerificationError(
                    f'{name} of the exported graph is {difference.rel_l2:.3g} (relative '
                    f"L2) from the checkpoint's on an input of shape {shape}, which is "
                    f'more than {rtol:g}: nothing was written; {remedy}'
                )
        comparisons.append((shape, differences))
    return comparisons
