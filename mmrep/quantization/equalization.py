"""Equalize the weight ranges of consecutive convs."""

from collections import Counter, defaultdict
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mmrep.deployment.onnx_graph import nodes_of

if TYPE_CHECKING:
    # Imported where they are needed: mmrep works without them.
    from onnx import ModelProto, NodeProto

#: Operators with ``f(s x) = s f(x)`` for ``s > 0``, each channel by itself.
_HOMOGENEOUS = ('Relu', 'LeakyRelu', 'MaxPool', 'AveragePool', 'GlobalAveragePool')

#: Channels with at most this share of the largest channel's range are not equalized.
_DEAD = 1e-4

#: The most sweeps over all pairs, and how far from 1 a scale may be for them to stop.
_SWEEPS, _ENOUGH = 100, 1e-3


class _Pair(NamedTuple):
    """A conv, and all convs that read what it computes."""

    first: 'NodeProto'
    after: list['NodeProto']


def equalize(model: 'ModelProto') -> int:
    """Equalize the ranges of each channel's weights in consecutive convs, in place.

    Let convs ``W2`` read the output of a conv ``W1, b1``, directly or through operators
    that commute with a positive factor (ReLU, pooling), and let nothing else read it. Then
    channel ``c`` is divided by ``s`` in the first conv and multiplied by ``s`` in the
    others::

        s = sqrt(r1 / r2),   W1[c] / s,   b1[c] / s,   W2[:, c] s

    where ``r1 = max |W1[c]|`` and ``r2 = max |W2[:, c]|``, so that both ranges become
    ``sqrt(r1 r2)``: Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization
    and Bias Correction", section 4.1. A channel whose weights are close to zero is left as
    it is. Sweeps over all pairs are repeated until the ranges agree. The function stays the
    same, except for the rounding of each weight.

    Args:
        model: The graph of a fused model.

    Returns:
        The number of convs whose output was scaled.
    """
    from onnx import numpy_helper

    pairs = _pairs(model)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    names = {
        name for pair in pairs for node in [pair.first, *pair.after] for name in _own(node)
    }
    arrays = {name: numpy_helper.to_array(tensors[name]).astype(float) for name in names}
    scaled = set()
    for _ in range(_SWEEPS):
        changed = {i for i, pair in enumerate(pairs) if _scale(pair, arrays)}
        if not changed:
            break
        scaled |= changed
    for name, array in arrays.items():
        dtype = numpy_helper.to_array(tensors[name]).dtype
        tensors[name].CopyFrom(numpy_helper.from_array(array.astype(dtype), name))
    return len(scaled)


def _scale(pair: _Pair, arrays: dict[str, np.ndarray]) -> bool:
    """Equalize a pair; returns whether a scale was more than ``_ENOUGH`` from 1."""
    first = arrays[pair.first.input[1]]
    after = [_by_group(node, arrays) for node in pair.after]
    before = abs(first).max((1, 2, 3))
    behind = np.max([abs(weight).max((1, 3, 4)).ravel() for weight in after], 0)
    # Weights close to zero are not scaled up: their bias would grow as much.
    used = (before > _DEAD * before.max()) & (behind > _DEAD * behind.max())
    scale = np.ones_like(before)
    scale[used] = np.sqrt(before[used] / behind[used])
    for name in _own(pair.first):
        arrays[name] /= scale.reshape(-1, *[1] * (arrays[name].ndim - 1))
    for weight in after:
        weight *= scale.reshape(weight.shape[0], 1, -1, 1, 1)
    return bool((abs(scale - 1) > _ENOUGH).any())


def _by_group(node: 'NodeProto', arrays: dict[str, np.ndarray]) -> np.ndarray:
    """A view of a conv's weight with the axes group, output, input, height, width."""
    weight = arrays[node.input[1]]
    groups = next((a.i for a in node.attribute if a.name == 'group'), 1)
    return weight.reshape(groups, -1, *weight.shape[1:])


def _own(node: 'NodeProto') -> list[str]:
    """The names of a conv's weight and bias."""
    return [name for name in node.input[1:] if name]


def _pairs(model: 'ModelProto') -> list[_Pair]:
    """The convs whose output only convs read, in the order of computation."""
    graph = model.graph
    readers = defaultdict(list)
    for node in nodes_of(graph.node):
        for name in node.input:
            readers[name].append(node)
    outputs = {value.name for value in graph.output}
    sizes = {tensor.name: len(tensor.dims) for tensor in graph.initializer}
    uses = Counter(name for node in nodes_of(graph.node) for name in node.input)

    def is_conv(node: 'NodeProto') -> bool:
        own = _own(node)
        return (
            node.op_type == 'Conv'
            and sizes.get(own[0]) == 4
            and all(name in sizes and uses[name] == 1 for name in own)
        )

    def after(value: str) -> list['NodeProto'] | None:
        """The convs that read a value; None where something else does."""
        if value in outputs:
            return None
        found: list[NodeProto] = []
        for node in readers[value]:
            if is_conv(node) and node.input[0] == value:
                convs = [node]
            elif node.op_type in _HOMOGENEOUS and len(node.output) == 1:
                convs = after(node.output[0])
            else:
                convs = None
            if convs is None:
                return None
            found += convs
        return found

    pairs = ((node, after(node.output[0])) for node in graph.node if is_conv(node))
    return [_Pair(node, convs) for node, convs in pairs if convs]
