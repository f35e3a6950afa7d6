"""Small ONNX graphs, as exporting makes them."""

from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

#: Channels of the input, rows and columns.
SHAPE = (6, 9, 8)

_ANY_SIZES = ['N', 'C', 'H', 'W']


class Graph:
    """A graph under construction; each method returns the name of what it computes."""

    def __init__(self, seed: int = 0) -> None:
        self.nodes: list[NodeProto] = []
        self.tensors: list[TensorProto] = []
        self.rng = np.random.default_rng(seed)

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        """A node with one output."""
        name = f'{op.lower()}_{len(self.nodes)}'
        self.nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def tensor(self, array: np.ndarray) -> str:
        """An initializer."""
        name = f'tensor_{len(self.tensors)}'
        self.tensors.append(numpy_helper.from_array(array.astype(np.float32), name))
        return name

    def conv(
        self,
        x: str,
        inputs: int,
        outputs: int,
        size: int = 3,
        group: int = 1,
        bias: bool = True,
    ) -> str:
        """A conv whose output channels have ranges of four orders of magnitude."""
        weight = self.rng.standard_normal((outputs, inputs // group, size, size))
        weight *= 10 ** self.rng.uniform(-2, 2, (outputs, 1, 1, 1))
        own = [self.tensor(weight)]
        if bias:
            own.append(self.tensor(self.rng.standard_normal(outputs)))
        pads = [size // 2] * 4
        return self.node('Conv', x, *own, group=group, pads=pads, kernel_shape=[size] * 2)

    def model(self, *outputs: str) -> ModelProto:
        """The graph, checked."""
        values = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, _ANY_SIZES)
            for name in outputs
        ]
        shape = helper.make_tensor_value_info('input', TensorProto.FLOAT, [1, *SHAPE])
        graph = helper.make_graph(self.nodes, 'graph', [shape], values, self.tensors)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)])
        model.ir_version = 8
        onnx.checker.check_model(model)
        return model


def arrays(model: ModelProto) -> dict[str, np.ndarray]:
    """The initializers of a graph."""
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def images(count: int, seed: int = 1) -> list[np.ndarray]:
    """Inputs of a graph."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((1, *SHAPE)).astype(np.float32) for _ in range(count)]
