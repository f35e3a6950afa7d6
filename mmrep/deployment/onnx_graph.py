"""Fold the constants of an ONNX graph, and name its nodes by their modules."""

import ast
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # Imported where they are needed: mmrep works without them.
    from onnx import ModelProto, NodeProto

#: More than any tensor has: a graph holds 2 GiB.
_NO_LIMIT = 2**31


def fold_constants(exported: 'ModelProto') -> None:
    """Compute what does not depend on the input, in place."""
    from onnxscript import ir, optimizer
    from onnxscript.ir.passes.common import LiftConstantsToInitializersPass

    model = ir.serde.deserialize_model(exported)
    optimizer.fold_constants(
        model,
        onnx_shape_inference=True,
        input_size_limit=_NO_LIMIT,
        output_size_limit=_NO_LIMIT,
        # Of every type: by default it leaves some as they are.
        should_fold=lambda node: node.op_type != 'Constant',
    )
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    optimizer.remove_unused_nodes(model)
    exported.CopyFrom(ir.serde.serialize_model(model))


def name_nodes(exported: 'ModelProto') -> None:
    """Name nodes by module and operator, ``backbone.stem.branch_reparam/Conv``, in place.

    The metadata of exporters is removed: it contains file paths of this machine.
    """
    graph = exported.graph
    read = Counter(name for node in nodes_of(graph.node) for name in node.input)
    # Modules with equal weights may share one tensor, which is named after the first.
    weights = {t.name for t in graph.initializer if read[t.name] == 1}
    taken = set()
    for node in nodes_of(graph.node):
        module = _module_of(node, weights)
        name = plain_name = f'{module}/{node.op_type}' if module else node.op_type
        count = 1
        while name in taken:
            count += 1
            name = f'{plain_name}_{count}'
        taken.add(name)
        node.name = name
        node.ClearField('metadata_props')
        node.ClearField('doc_string')
    for holder in (graph, *graph.value_info, *graph.input, *graph.output):
        holder.ClearField('metadata_props')


def _module_of(node: 'NodeProto', weights: set[str]) -> str:
    """The name of the module that a node comes from; '' for the model itself."""
    weight = node.input[1] if len(node.input) > 1 else ''
    if weight in weights and weight.endswith('.weight'):
        # The scopes of a conv with a folded norm are those of the norm.
        return weight.removeprefix('model.').removesuffix('.weight')
    for entry in node.metadata_props:
        if entry.key == 'pkg.torch.onnx.name_scopes':
            # The root '', its modules from the outermost, and last the operator.
            scopes = ast.literal_eval(entry.value)
            module = scopes[-2] if scopes[0] == '' else ''
            return module.removeprefix('model').removeprefix('.')
    # TorchScript's: ``/model/backbone/stage_1/stage_1.0/conv/Conv``.
    parts = node.name.removeprefix('/model').strip('/').split('/')
    # The entries of a list repeat its name: stage_1/stage_1.0.
    followed = pairwise(parts)
    return '.'.join(part for part, after in followed if not after.startswith(f'{part}.'))


def nodes_of(nodes: Iterable['NodeProto']) -> Iterator['NodeProto']:
    """The nodes and those of the graphs inside them."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            yield from nodes_of(attribute.g.node)
