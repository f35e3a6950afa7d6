"""Quantizing a graph by ONNX Runtime."""

import numpy as np
import pytest

pytest.importorskip('onnxruntime')

import onnx
from onnx import TensorProto
from onnx_graphs import Graph, arrays, images

from mmrep.errors import UserError
from mmrep.quantization import METHODS, Recipe
from mmrep.quantization.quantizer import Quantizer, prepared
from mmrep.quantization.sessions import Session, errors, total_sqnr


def network(seed: int = 0) -> onnx.ModelProto:
    graph = Graph(seed)
    x = graph.node('Relu', graph.conv('input', 6, 8))
    x = graph.node('Relu', graph.conv(x, 8, 8, group=8))
    x = graph.node('GlobalAveragePool', graph.conv(x, 8, 4, size=1))
    return graph.model(x)


@pytest.fixture
def quantizer():
    return Quantizer(network(), images(9))


def stored(model) -> dict[str, int]:
    """The types of what the quantized weights and biases are stored in, by name."""
    return {t.name: t.data_type for t in model.graph.initializer}


def test_layers_are_the_nodes_with_weights(quantizer):
    assert quantizer.layers == ['conv_0', 'conv_2', 'conv_4']
    weights = arrays(quantizer.model)
    for name, weight in zip(
        quantizer.layers, ('tensor_0', 'tensor_2', 'tensor_4'), strict=True
    ):
        expected = abs(weights[weight]).reshape(len(weights[weight]), -1).max(1)
        np.testing.assert_array_equal(quantizer.channel_ranges(name), expected)


@pytest.mark.parametrize('op', ['Gemm', 'Gemm, transposed', 'MatMul', 'ConvTranspose'])
def test_output_channels_of_other_layers(op):
    graph = Graph()
    weight = np.arange(1.0, 13).reshape(6, 2)
    if op == 'ConvTranspose':
        out = graph.node(op, 'input', graph.tensor(weight[..., None, None]))
    else:
        x = graph.node('Flatten', graph.node('GlobalAveragePool', 'input'))
        name, _, transposed = op.partition(', ')
        weight_name = graph.tensor(weight.T if transposed else weight)
        out = graph.node(name, x, weight_name, **({'transB': 1} if transposed else {}))
    model = graph.model(graph.node('Relu', out))
    quantizer = Quantizer(model, images(1))
    (layer,) = quantizer.layers
    np.testing.assert_array_equal(quantizer.channel_ranges(layer), [11, 12])


@pytest.mark.parametrize('method', METHODS)
def test_weights_are_int8_and_activations_uint8(quantizer, method):
    for per_channel in (True, False):
        model = quantizer.quantize(Recipe(method, per_channel))
        onnx.checker.check_model(model, full_check=True)
        found = stored(model)
        scales = arrays(model)
        for name, channels in (('tensor_0', 8), ('tensor_2', 8), ('tensor_4', 4)):
            assert found[f'{name}_quantized'] == TensorProto.INT8
            assert scales[f'{name}_scale'].size == (channels if per_channel else 1)
        activations = [n for n in found if n.endswith('_zero_point') and 'tensor' not in n]
        assert len(activations) >= 4
        assert {found[name] for name in activations} == {TensorProto.UINT8}


@pytest.mark.parametrize('method', METHODS)
def test_progress_of_calibrating_is_shown(method, capsys):
    """What ONNX Runtime prints is not."""

    def track(items, title):
        for item in items:
            print(title)
            yield item

    Quantizer(network(), images(3), track=track).quantize(Recipe(method, True))
    assert capsys.readouterr().out == 3 * f'calibrating, {method}\n'


def test_percentile_leaves_outliers_out():
    """One pixel of a thousand images is far away, and only one method looks at it."""
    quantizer = Quantizer(network(), images(300))
    quantizer.images[7][0, 0, 0, 0] = 1e3
    scales = {
        method: arrays(quantizer.quantize(Recipe(method, True)))['input_scale']
        for method in METHODS
    }
    assert scales['percentile'] < scales['minmax'] / 20


def test_each_end_of_a_range_is_found_by_itself():
    """No level stands for what is negative in one pixel alone."""
    positive = [abs(image) for image in images(100)]
    positive[3][0, 0, 0, 0] = -100
    model = Quantizer(network(), positive).quantize(Recipe('percentile', True))
    assert arrays(model)['input_zero_point'] <= 5


def test_calibration_in_parts_sees_all():
    """Ranges are of all images, not of the last few."""
    some = images(9)
    for method in METHODS:
        some[0][:] *= 50
        first = arrays(Quantizer(network(), some).quantize(Recipe(method, True)))
        last = arrays(Quantizer(network(), some[::-1]).quantize(Recipe(method, True)))
        np.testing.assert_allclose(first['input_scale'], last['input_scale'], rtol=0.1)
        some[0][:] /= 50


@pytest.mark.parametrize('method', METHODS)
def test_images_of_several_sizes(method):
    graph = Graph()
    model = graph.model(graph.node('Relu', graph.conv('input', 6, 8)))
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = f'size_{axis}'
    some = [image[..., : 4 + i, :] for i, image in enumerate(images(5))]
    scales = arrays(Quantizer(model, some).quantize(Recipe(method, True)))
    assert scales['input_scale'] > 0


def test_what_was_quantized_before_changes_nothing():
    recipe = Recipe('minmax', False)
    fresh, used = Quantizer(network(), images(3)), Quantizer(network(), images(3))
    used.quantize(recipe)
    used.quantize(recipe, keep=['conv_0'])
    first, second = (q.quantize(recipe, only='conv_0') for q in (fresh, used))
    assert first.SerializeToString() == second.SerializeToString()


def test_the_graph_in_fp32_stays_as_it_is(quantizer):
    before = quantizer.model.SerializeToString()
    for method in METHODS:
        quantizer.quantize(Recipe(method, per_channel=True))
        assert quantizer.model.SerializeToString() == before


def test_per_channel_is_closer(quantizer):
    """The channels' ranges are of four orders of magnitude."""
    fp32 = Session(quantizer.model)
    references = [fp32(image) for image in quantizer.images]
    sqnr = {
        per_channel: total_sqnr(
            errors(
                references,
                Session(quantizer.quantize(Recipe('minmax', per_channel))),
                quantizer.images,
            )
        )
        for per_channel in (True, False)
    }
    assert sqnr[True] > 25 and sqnr[True] > sqnr[False] + 3


def test_keep_and_only(quantizer):
    recipe = Recipe('minmax', True)
    kept = stored(quantizer.quantize(recipe, keep=['conv_2']))
    assert kept['tensor_2'] == TensorProto.FLOAT
    assert 'tensor_0_quantized' in kept and 'tensor_4_quantized' in kept
    only = stored(quantizer.quantize(recipe, only='conv_2'))
    assert 'tensor_2_quantized' in only
    assert only['tensor_0'] == only['tensor_4'] == TensorProto.FLOAT
    # The model itself is as before.
    assert set(stored(quantizer.model).values()) == {TensorProto.FLOAT}


def test_reduced_range():
    model = network()
    most = {
        reduced: abs(
            arrays(Quantizer(model, images(2), reduced).quantize(Recipe('minmax', True)))[
                'tensor_0_quantized'
            ].astype(int)
        ).max()
        for reduced in (False, True)
    }
    assert most == {False: 127, True: 64}


def test_matching(quantizer):
    assert quantizer.matching([]) == []
    assert quantizer.matching(['conv_[24]', '*_2']) == ['conv_2', 'conv_4']
    with pytest.raises(
        UserError, match='--exclude head matches no layer: choose from conv_0, conv_2'
    ):
        quantizer.matching(['conv_0', 'head'])


def test_nothing_to_quantize():
    graph = Graph()
    with pytest.raises(UserError, match='nothing to quantize'):
        Quantizer(graph.model(graph.node('Relu', 'input')), images(1))


def test_what_onnxruntime_cannot_do_is_one_sentence(tmp_path, capfd):
    (tmp_path / 'a.onnx').write_text('no graph')
    with pytest.raises(UserError, match='ONNX Runtime cannot prepare this model'):
        prepared(tmp_path / 'a.onnx')
    assert capfd.readouterr().out == ''
