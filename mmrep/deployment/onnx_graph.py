"""An ONNX graph: what does not depend on its input is computed once."""

from collections.abc import Iterable, Iterator
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


def nodes_of(nodes: Iterable['NodeProto']) -> Iterator['NodeProto']:
    """The nodes and those of the graphs inside them."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            yield from nodes_of(attribute.g.node)
