"""From a config and a checkpoint to an ONNX file, verified with ONNX Runtime."""

import json
import re
from collections import Counter
from dataclasses import dataclass
from functools import partial
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING

from mmengine.config import Config
from torch import nn

from mmrep.checkpoints import (
    atomic_write,
    is_deploy_form,
    load_strictly,
    out_path,
    plain,
    read_checkpoint,
    refuse_existing,
    sha256_of,
    state_dict_of,
)
from mmrep.errors import CheckpointError, UserError
from mmrep.reparam import (
    NotFoldableError,
    branch_by_branch,
    conv_geometry,
    flatten_outputs,
    reparam_blocks,
    seen_inputs,
)
from mmrep.version import __version__

from .building import build_model
from .config import Shape, deploy_config, input_shape, is_deploy_config
from .onnx_graph import nodes_of
from .onnx_tracing import ExportError, Resize, exporters, resized, trace, unchanged
from .onnx_verification import Comparisons, Reference, verify
from .pair import check_pair
from .running import VerificationError, fuse, run_form, seeded_input
from .verification import (
    changes_of,
    check_dependence,
    check_outputs,
    check_rtol,
    observe_blocks,
    remarks_on,
    verify_blocks,
)

if TYPE_CHECKING:
    # Imported where it is needed: mmrep works without it.
    from onnx import ModelProto

#: The inputs to compare: number of images, and rows and columns added to the shape.
_FIXED = ((1, 0, 0), (1, 0, 0), (1, 0, 0))
_DYNAMIC = ((2, 0, 0), (1, 32, 64), (3, 33, 1))


@dataclass(frozen=True)
class OnnxExport:
    """What :func:`export_onnx` did.

    Args:
        out: The file.
        size: Its bytes.
        blocks: Number of re-parameterizable blocks.
        exporter: The exporter of torch that wrote it: ``'torch.export'``, or
            ``'TorchScript'``, where the former fails or cannot write the opset.
        comparisons: The shape of each input that was compared, and how far each output
            of the file is from that of the checkpoint's model.
        operators: How often each operator occurs in the graph, the most frequent first.
        remarks: What a user should know of the export and its outputs, a sentence each.
    """

    out: Path
    size: int
    blocks: int
    exporter: str
    comparisons: Comparisons
    operators: dict[str, int]
    remarks: list[str]


def export_onnx(
    config: Config,
    checkpoint: str | Path,
    out: str | Path,
    form: str = 'deploy',
    dynamic: bool = False,
    opset: int | None = None,
    shape: Shape | None = None,
    rtol: float = 1e-4,
    overwrite: bool = False,
    source_config: str | Path = '',
    upsample: bool = False,
) -> OnnxExport:
    """Write a model's raw outputs as an ONNX graph that ONNX Runtime computes the same.

    The graph of the train form has every branch of a block, and a node for each of its
    convs and norms. In that of the deploy form the norms outside the blocks are folded,
    too. Everything that does not depend on the input is computed at export, so that every
    operator in the graph works on the input.

    The file is compared with the checkpoint's model in PyTorch. If that is in train form,
    it computes branch by branch, whichever form is exported, and each block is also
    compared with its fused conv.

    Args:
        config: The config that the checkpoint was trained with, or its deploy config.
        checkpoint: The checkpoint. One in train form is fused for ``form='deploy'``.
        out: The file to write.
        form: ``'deploy'`` or ``'train'``. Default: ``'deploy'``.
        dynamic: Whether the graph takes every batch size, height and width.
            Default: False, one image of one size.
        opset: Version of ONNX's operators. Default: None, which means 18, or 17 if
            TorchScript writes the file.
        shape: Channels, height and width of the input. Default: the config's.
        rtol: The largest relative L2 error allowed. Default: 1e-4.
        overwrite: Whether to replace an existing file. Default: False.
        source_config: Name of the config, for the record. Default: ''.
        upsample: Whether the graph ends with the resizing of a segmentor's logits to the
            size of its input, bilinear as the model's own prediction. Default: False.

    Raises:
        UserError: With one sentence, if anything is wrong; then nothing is written.
    """
    # A string: a Path would turn the '//' of a URL into '/'.
    checkpoint, out = expanduser(checkpoint), out_path(out, '.onnx')
    refuse_existing(out, overwrite=overwrite)
    check_rtol(rtol)
    try:
        import onnx
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f'exporting needs onnx, onnxruntime and onnxscript ({error}): pip install '
            "'mmrep[onnx]'"
        ) from None

    model, given = _load(config, source_config, checkpoint, form)
    align_corners = getattr(model, 'align_corners', None)
    if upsample and align_corners is None:
        raise UserError(
            f'--upsample is for segmentors, and {type(model).__name__} is not one: '
            'leave it out'
        )
    resize = partial(resized, align_corners=align_corners) if upsample else unchanged
    if dynamic:
        _refuse_same_padding(model)
    with branch_by_branch(model):
        with seen_inputs(model) as seen:
            references, remarks = _references(
                model, given, shape or input_shape(config), dynamic, resize
            )
        if form == 'deploy':
            # None is left to fuse in a model that is given in deploy form.
            blocks = observe_blocks(model, seen) if given == 'train' else {}
            fuse(model, '; export it with --form train')
            verify_blocks(blocks, model, rtol)
        properties = {
            'version': __version__,
            'form': form,
            'source': Path(checkpoint).name,
            'source_sha256': sha256_of(checkpoint),
            'source_config': Path(source_config).name,
            # The preprocessing that the input needs.
            'data_preprocessor': (
                config.model.get('data_preprocessor') or config.get('data_preprocessor')
            ),
        }

        def write(exporter: str) -> tuple['ModelProto', Comparisons]:
            exported = trace(exporter, model, references, form, dynamic, opset, resize)
            onnx.helper.set_model_props(exported, {'mmrep': json.dumps(plain(properties))})
            with atomic_write(out) as temporary:
                onnx.save(exported, temporary)
                return exported, verify(temporary, references, rtol)

        exporter, *others = exporters(opset)
        failure = ''
        try:
            exported, comparisons = write(exporter)
        except (ExportError, VerificationError) as error:
            if not others:
                raise
            # As text: the traceback would keep the first graph in memory.
            failure = str(error).partition(': nothing was written')[0]
        if failure:
            remarks.append(f'written by {others[0]}, because {exporter} failed: {failure}')
            (exporter,) = others
            exported, comparisons = write(exporter)
    if align_corners is not None:
        remarks += _remarks_on_size(references[0])
    operators = Counter(node.op_type for node in nodes_of(exported.graph.node))
    return OnnxExport(
        out,
        out.stat().st_size,
        len(reparam_blocks(model)),
        exporter,
        comparisons,
        dict(operators.most_common()),
        remarks,
    )


def _load(
    config: Config, source_config: str | Path, checkpoint: str, form: str
) -> tuple[nn.Module, str]:
    """The model of a checkpoint and the form that it is in."""
    source = read_checkpoint(checkpoint)
    check_pair(config, source_config, checkpoint, source)
    state_dict = state_dict_of(source, checkpoint)
    fused = is_deploy_form(state_dict) or is_deploy_config(config)
    given = 'deploy' if fused else 'train'
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


def _remarks_on_size(reference: Reference) -> list[str]:
    """What to know of logits that are smaller than the image."""
    return [
        f'{name} is {"x".join(map(str, output.shape[2:]))} for an input of '
        f'{"x".join(map(str, reference.x.shape[2:]))}: resize it before the argmax, or '
        'export with --upsample'
        for name, output in reference.outputs.items()
        if output.ndim == 4 and output.shape[2:] != reference.x.shape[2:]
    ]


def _references(
    model: nn.Module, form: str, shape: Shape, dynamic: bool, resize: Resize
) -> tuple[list[Reference], list[str]]:
    """What a model of a form computes; the first input is of the shape asked for.

    Returns:
        That, and what there is to say of it.
    """
    channels, height, width = shape

    def compute(seed: int, images: int, rows: int, columns: int) -> Reference:
        x = seeded_input((images, channels, height + rows, width + columns), seed)
        outputs = resize(flatten_outputs(run_form(model, x, form)), x)
        named = {re.sub(r'\W+', '_', name).strip('_'): y for name, y in outputs.items()}
        return Reference(x, named)

    references = []
    sizes = _DYNAMIC if dynamic else _FIXED
    for seed, size in enumerate(sizes):
        try:
            references.append(compute(seed, *size))
        except UserError:
            if not references:
                raise
            # A model that takes multiples of 32 pixels only is asked for no others.
    if not any(output.numel() for output in references[0].outputs.values()):
        raise UserError(
            'the model returns no tensor, or empty ones: there is nothing to export'
        )
    first = references[0].outputs
    check_outputs(first, form)
    dependence = changes_of(first, compute(len(sizes), *sizes[0]).outputs)
    check_dependence(dependence)
    if dynamic and len(references) == 1:
        raise UserError(
            f'the model takes no other size than {height}x{width}: leave --dynamic out'
        )
    return references, remarks_on(dependence)
