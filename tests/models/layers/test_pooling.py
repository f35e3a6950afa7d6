"""The gradients of the average pooling, by each of the ways in which it is computed."""

import pytest
import torch
import torch.nn.functional as F
from geometries import conv_options
from hypothesis import given
from hypothesis import strategies as st
from laws import Calls, assert_same, image, step
from torch import Tensor, nn

from mmrep.models.layers import DilatedAvgPool2d
from mmrep.reparam import ConvGeometry

LAYOUTS = {
    'contiguous': torch.contiguous_format,
    'channels last': torch.channels_last,
}
dtypes = st.sampled_from((torch.float32, torch.float64))
layouts = st.sampled_from(list(LAYOUTS))

every_dtype = pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
every_layout = pytest.mark.parametrize('layout', LAYOUTS)


class DepthwiseConv(nn.Module):
    """The conv that the pooling is, with autograd's own gradients."""

    def __init__(self, geometry: ConvGeometry) -> None:
        super().__init__()
        self.geometry = geometry

    def forward(self, x: Tensor) -> Tensor:
        geometry, channels = self.geometry, x.shape[1]
        rows, columns = geometry.padding
        modes = {'zeros': 'constant'}
        mode = modes.get(geometry.padding_mode, geometry.padding_mode)
        x = F.pad(x, (columns, columns, rows, rows), mode=mode)
        weight = torch.ones(channels, 1, *geometry.kernel_size, dtype=x.dtype)
        weight /= weight[0].numel()
        return F.conv2d(x, weight, None, geometry.stride, 0, geometry.dilation, channels)


def assert_same_average(geometry: ConvGeometry, x: Tensor) -> None:
    assert_same(step(DepthwiseConv(geometry), x), step(DilatedAvgPool2d(geometry), x))


def keeping_size(
    kernel_size: tuple[int, int], dilation: tuple[int, int] = (1, 1), **options
) -> ConvGeometry:
    """The geometry that is its own transpose."""
    spans = [(k - 1) * d for k, d in zip(kernel_size, dilation, strict=True)]
    assert not any(span % 2 for span in spans)
    padding = tuple(span // 2 for span in spans)
    return ConvGeometry(3, 3, kernel_size, padding=padding, dilation=dilation, **options)


@given(conv_options(), dtypes, layouts)
def test_gradients_of_every_geometry(options, dtype, layout):
    x = image(2, options['in_channels'], *options.pop('size'), dtype=dtype)
    x = x.contiguous(memory_format=LAYOUTS[layout])
    assert_same_average(ConvGeometry(**options), x)


odd = st.sampled_from((1, 3, 5, 7))


@given(
    st.tuples(odd, odd), st.tuples(st.integers(1, 3), st.integers(1, 3)), dtypes, layouts
)
def test_gradients_where_the_size_is_kept(kernel_size, dilation, dtype, layout):
    x = image(2, 3, 6, 5, dtype=dtype).contiguous(memory_format=LAYOUTS[layout])
    geometry = keeping_size(kernel_size, dilation)
    assert_same_average(geometry, x)


@every_dtype
@every_layout
def test_is_torchs_pooling(dtype, layout):
    class Pooling(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.avg_pool2d(x, (3, 5), (1, 1), (1, 2))

    x = image(2, 3, 8, 9, dtype=dtype).contiguous(memory_format=LAYOUTS[layout])
    expected, output = (
        step(module, x) for module in (Pooling(), DilatedAvgPool2d(keeping_size((3, 5))))
    )
    assert_same(expected, output)


GEOMETRIES = {
    'its own transpose': keeping_size((3, 5)),
    'even kernel, dilated': keeping_size((2, 4), (2, 2)),
    'stride': ConvGeometry(3, 3, (3, 3), stride=(2, 1), padding=(1, 1)),
    'no padding': ConvGeometry(3, 3, (3, 3)),
    'more padding': ConvGeometry(3, 3, (3, 3), padding=(2, 2)),
    'dilation': ConvGeometry(3, 3, (3, 3), padding=(1, 1), dilation=(2, 1)),
    'circular': keeping_size((3, 3), padding_mode='circular'),
    'reflect': keeping_size((3, 3), padding_mode='reflect'),
    "TensorFlow's padding": ConvGeometry(3, 3, (3, 3), (2, 2), padding_mode='same'),
}


@pytest.mark.parametrize('name', GEOMETRIES)
@every_layout
def test_gradients_by_finite_differences(name, layout):
    """Of first and second order."""
    module = DilatedAvgPool2d(GEOMETRIES[name])
    x = image(2, 3, 5, 6).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    assert torch.autograd.gradcheck(module, (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(module, (x,), fast_mode=True)


@pytest.mark.parametrize(
    ('dtype', 'options', 'kind'),
    [
        (torch.float32, {}, 'conv2d'),
        (torch.float64, {}, 'conv2d'),
        (torch.bfloat16, {}, 'avg_pool2d'),
        (torch.bfloat16, dict(dilation=(2, 2), padding=(2, 2)), 'conv2d'),
        (torch.bfloat16, dict(padding=(2, 2)), 'conv2d'),
        (torch.bfloat16, dict(padding_mode='reflect'), 'conv2d'),
    ],
)
def test_the_faster_way(dtype, options, kind):
    """In half precision torch's pooling is the more exact, where it can pad so."""
    geometry = ConvGeometry(3, 3, (3, 3), **{'padding': (1, 1), **options})
    x = image(2, 3, 7, 6, dtype=dtype)
    with Calls() as calls:
        output = DilatedAvgPool2d(geometry)(x)
    ways = 'conv2d', 'avg_pool2d'
    assert {way: calls[way] for way in ways} == {way: int(way == kind) for way in ways}
    assert_same(DilatedAvgPool2d(geometry)(x.double()), output)


@pytest.mark.parametrize('name', ['its own transpose', 'stride'])
def test_a_trace_has_no_function_of_ours(name):
    x = image(1, 3, 5, 6, dtype=torch.float32).requires_grad_()
    module = DilatedAvgPool2d(GEOMETRIES[name])
    graph = torch.jit.trace(module, x, check_trace=False).inlined_graph
    kinds = {node.kind() for node in graph.nodes()}
    assert kinds & {'aten::avg_pool2d', 'aten::_convolution'}
    assert not any(kind.startswith('prim::PythonOp') for kind in kinds)


def test_autocast_does_not_round_the_share():
    """1 / 9 in half precision is 0.2 % too much."""
    x = image(2, 3, 8, 8, dtype=torch.float32).abs()
    pool = DilatedAvgPool2d(keeping_size((3, 3)))
    with torch.autocast('cpu', torch.bfloat16):
        output = pool(x)
    assert_same(pool(x), output, tolerance=1e-6)


@pytest.mark.parametrize('name', GEOMETRIES)
def test_meta_device(name):
    pool = DilatedAvgPool2d(GEOMETRIES[name])
    x = image(2, 3, 8, 8)
    assert pool(x.to('meta')).shape == pool(x).shape
