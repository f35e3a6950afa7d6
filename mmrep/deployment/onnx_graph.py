"""An ONNX graph as a user finds it: constants folded, nodes named by their modules."""

import ast
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # Imported where they are needed: mmrep works without them.
    from onnx import ModelProto, NodeProto

#: A graph holds 2 GiB.
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
        # Whatever its type: it leaves some by itself.
        should_fold=lambda node: node.op_type != 'Constant',
    )
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    optimizer.remove_unused_nodes(model)
    exported.CopyFrom(ir.serde.serialize_model(model))


def name_nodes(exported: 'ModelProto') -> None:
    """Name nodes by module and operator, ``backbone.stem.branch_reparam/Conv``, in place.

    What the exporter says of a node beside its name is dropped: it has the paths of the
    machine.
    """
    weights = {tensor.name for tensor in exported.graph.initializer}
    taken = set()
    for node in nodes_of(exported.graph.node):
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
    exported.graph.ClearField('metadata_props')
    graph = exported.graph
    for value in (*graph.value_info, *graph.input, *graph.output):
        value.ClearField('metadata_props')


def _module_of(node: 'NodeProto', weights: set[str]) -> str:
    """The name of the module that a node comes from; '' for the model itself."""
    weight = node.input[1] if len(node.input) > 1 else ''
    if weight in weights and weight.endswith('.weight'):
        # A conv into which a norm is folded counts as the norm otherwise.
        return weight.removeprefix('model.').removesuffix('.weight')
    for entry in node.metadata_props:
        if entry.key == 'pkg.torch.onnx.name_scopes':
            # The root '', its modules from the outermost, and last the operator.
            scopes = ast.literal_eval(entry.value)
            module = scopes[-2] if scopes[0] == '' else ''
            return module.removeprefix('model').removeprefix('.')
    # TorchScript's: ``/model/backbone/stage_1/stage_1.0/conv/Conv``.
    parts = node.name.removeprefix('/model').strip('/').split('/')
    # A list is in the names of its entries, too.
    followed = pairwise(parts)
    return '.'.join(part for part, after in followed if not after.startswith(f'{part}.'))


def nodes_of(nodes: Iterable['NodeProto']) -> Iterator['NodeProto']:
    """The nodes and those of the graphs inside them."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            yield from nodes_of(attribute.g.node)
