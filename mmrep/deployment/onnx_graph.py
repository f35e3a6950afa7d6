"""An ONNX graph: what does not depend on its input is computed once."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # Imported where they are needed: mmrep works without them.
    from onnx import ModelProto, NodeProto


def fold_constants(exported: 'ModelProto') -> None:
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


def nodes_of(nodes: Iterable['NodeProto']) -> Iterator['NodeProto']:
    """The nodes and those of the graphs inside them."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            yield from nodes_of(attribute.g.node)


def _names_read(nodes: Iterable['NodeProto']) -> set[str]:
    return {name for node in nodes_of(nodes) for name in node.input}
