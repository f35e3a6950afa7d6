"""Cross-layer equalization: the same function, with ranges that are alike."""

import copy
from itertools import pairwise

import numpy as np
import pytest

pytest.importorskip('onnxruntime')

from onnx import numpy_helper
from onnx_graphs import Graph, arrays, images

from mmrep.quantization import equalize
from mmrep.quantization.sessions import Session


def chain(between, inner: int = 8, outer: int = 5, **second):
    """Two convs with something between."""

    def build() -> tuple[Graph, str]:
        graph = Graph()
        x = between(graph, graph.conv('input', 6, inner))
        return graph, graph.conv(x, inner, outer, **second)

    return build


def residual() -> tuple[Graph, str]:
    """A sum reads the first conv, too: only the one inside may be equalized."""
    graph = Graph()
    first = graph.node('Relu', graph.conv('input', 6, 8))
    inside = graph.node('Relu', graph.conv(first, 8, 8))
    return graph, graph.node('Add', first, graph.conv(inside, 8, 8))


def two_readers() -> tuple[Graph, str]:
    graph = Graph()
    x = graph.node('Relu', graph.conv('input', 6, 8))
    y = graph.conv(x, 8, 4), graph.conv(graph.node('LeakyRelu', x), 8, 4, size=1)
    return graph, graph.node('Add', *y)


def long() -> tuple[Graph, str]:
    """Each conv but the first and the last is on both sides of a pair."""
    graph = Graph()
    x, channels = 'input', 6
    for outputs, group in ((8, 1), (8, 8), (12, 2), (4, 4), (5, 1)):
        x = graph.node('Relu', graph.conv(x, channels, outputs, group=group))
        channels = outputs
    return graph, x


def relu(graph, x):
    return graph.node('Relu', x)


def pooled(graph, x):
    pool = dict(kernel_shape=[2, 2], strides=[2, 2])
    return graph.node('AveragePool', graph.node('MaxPool', relu(graph, x), **pool), **pool)


CASES = {
    'nothing between': (chain(lambda graph, x: x), 1),
    'ReLU': (chain(relu), 1),
    'LeakyReLU': (chain(lambda graph, x: graph.node('LeakyRelu', x, alpha=0.2)), 1),
    'pooling': (chain(pooled), 1),
    'global pooling': (chain(lambda g, x: g.node('GlobalAveragePool', x), size=1), 1),
    'no bias': (chain(relu, bias=False), 1),
    'groups': (chain(relu, outer=6, group=2), 1),
    'depthwise': (chain(relu, outer=16, group=8), 1),
    'two readers': (two_readers, 1),
    'residual': (residual, 1),
    'long': (long, 4),
    # No factor goes through these.
    'sigmoid': (chain(lambda graph, x: graph.node('Sigmoid', x)), 0),
    'sum with itself': (chain(lambda graph, x: graph.node('Mul', x, x)), 0),
}


def assert_same(model, other) -> None:
    """Two graphs are one function, but for rounding."""
    for image in images(3):
        (reference,), (found,) = Session(model)(image), Session(other)(image)
        assert np.linalg.norm(found - reference) < 1e-6 * np.linalg.norm(reference)


@pytest.mark.parametrize('name', CASES)
def test_same_function(name):
    build, expected = CASES[name]
    graph, out = build()
    model = graph.model(out)
    equalized = copy.deepcopy(model)
    assert equalize(equalized) == expected
    before, after = arrays(model), arrays(equalized)
    assert before.keys() == after.keys()
    same = all((before[n] == after[n]).all() for n in before)
    assert same == (expected == 0)
    assert_same(model, equalized)


def ranges(model) -> list[tuple[np.ndarray, np.ndarray]]:
    """``max |w|`` of each channel on both sides of the chains of ``long`` and ``relu``."""
    nodes = [node for node in model.graph.node if node.op_type == 'Conv']
    weights = arrays(model)
    found = []
    for first, second in pairwise(nodes):
        (group,) = (a.i for a in second.attribute if a.name == 'group')
        one, two = weights[first.input[1]], weights[second.input[1]]
        behind = []
        for channel in range(len(one)):
            index, inside = divmod(channel, two.shape[1])
            each = len(two) // group
            behind.append(abs(two[index * each : (index + 1) * each, inside]).max())
        found.append((abs(one).max((1, 2, 3)), np.array(behind)))
    return found


@pytest.mark.parametrize('name', ['ReLU', 'groups', 'depthwise', 'long'])
def test_ranges_are_alike(name):
    graph, out = CASES[name][0]()
    model = graph.model(out)
    assert max(abs(np.log(one / two)).max() for one, two in ranges(model)) > 1
    equalize(model)
    for one, two in ranges(model):
        np.testing.assert_allclose(one, two, rtol=5e-3)


def test_dead_channels_stay():
    graph, out = chain(relu)()
    for tensor in graph.tensors:
        array = numpy_helper.to_array(tensor).copy()
        if array.ndim == 4:
            array[2], array[:, 1] = 0, 0
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    model = graph.model(out)
    before = copy.deepcopy(model)
    assert equalize(model) == 1
    assert_same(before, model)
    for name, array in arrays(model).items():
        if array.ndim == 4:
            np.testing.assert_array_equal(array[2], arrays(before)[name][2])


def test_a_channel_of_next_to_no_weights_stays():
    """Its bias would become large, and with it the range of what int8 has to hold."""
    graph, out = chain(relu)()
    weight = numpy_helper.to_array(graph.tensors[0]).copy()
    weight[3] *= 1e-9
    graph.tensors[0].CopyFrom(numpy_helper.from_array(weight, graph.tensors[0].name))
    model = graph.model(out)
    before = arrays(copy.deepcopy(model))
    assert equalize(model) == 1
    after = arrays(model)
    assert after['tensor_1'][3] == before['tensor_1'][3]
    assert (after['tensor_1'] != before['tensor_1']).sum() == 7


def test_what_is_read_elsewhere_stays():
    """An output of the graph, and a weight of two convs."""
    graph, out = chain(relu)()
    inner = next(node.output[0] for node in graph.nodes if node.op_type == 'Relu')
    assert equalize(graph.model(out, inner)) == 0

    graph = Graph()
    x = graph.conv('input', 6, 6)
    first = graph.nodes[-1]
    y = graph.node('Conv', x, first.input[1], pads=[1] * 4)
    assert equalize(graph.model(graph.conv(y, 6, 4))) == 0
