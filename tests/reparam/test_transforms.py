import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from geometries import conv_options, span
from hypothesis import given
from hypothesis import strategies as st
from laws import Calls, assert_same, image
from torch import Tensor
from torch.nn.utils.fusion import fuse_conv_bn_weights

from mmrep.reparam import (
    add_branches,
    average_kernel,
    bn_affine,
    constant_response,
    fuse_bn,
    identity_kernel,
    merge_convs,
    pad_kernel,
    widen_groups,
)

some = st.booleans()
ZEROS = ('zeros',)


class Conv:
    """A conv of drawn tensors and geometry, with its input."""

    def __init__(
        self, options: dict, bias: bool = True, seed: int = 0, x: Tensor | None = None
    ) -> None:
        outs, self.groups = options['out_channels'], options['groups']
        ins = options['in_channels'] // self.groups
        self.weight = image(outs, ins, *options['kernel_size'], seed=10 + seed)
        self.bias = image(outs, seed=20 + seed) if bias else None
        self.x = image(2, options['in_channels'], *options['size']) if x is None else x
        self.place = {k: options[k] for k in ('stride', 'padding', 'dilation')}

    def __call__(
        self, weight: Tensor | None = None, bias: Tensor | None = None, **place
    ) -> Tensor:
        if weight is None:
            weight, bias = self.weight, self.bias
        place = {**self.place, **place}
        return F.conv2d(self.x, weight, bias, groups=self.groups, **place)


affines = st.sampled_from(('', 'gamma', 'beta', 'gamma beta'))


def batch_norm(channels: int, affine: str = 'gamma beta') -> dict:
    """The drawn tensors of a batch norm, as ``fuse_bn`` names them."""
    return dict(
        mean=image(channels, seed=30),
        var=image(channels, seed=31).square() + 0.1,
        eps=0.07,
        gamma=image(channels, seed=32) if 'gamma' in affine else None,
        beta=image(channels, seed=33) if 'beta' in affine else None,
    )


@given(conv_options(padding_modes=ZEROS), some, affines)
def test_fuse_bn(options, bias, affine):
    conv, norm = Conv(options, bias), batch_norm(options['out_channels'], affine)
    mean, var, eps, gamma, beta = norm.values()
    expected = F.batch_norm(conv(), mean, var, gamma, beta, eps=eps)
    fused = fuse_bn(conv.weight, conv.bias, **norm)
    assert_same(expected, conv(*fused))
    oracle = fuse_conv_bn_weights(conv.weight, conv.bias, mean, var, eps, gamma, beta)
    assert_same(oracle, fused)


@given(st.integers(1, 5), affines)
def test_bn_affine(channels, affine):
    norm, x = batch_norm(channels, affine), image(2, channels, 3, 4)
    mean, var, eps, gamma, beta = norm.values()
    scale, shift = (tensor.reshape(-1, 1, 1) for tensor in bn_affine(**norm))
    assert_same(F.batch_norm(x, mean, var, gamma, beta, eps=eps), scale * x + shift)


@given(conv_options(padding_modes=ZEROS), st.integers(1, 4))
def test_add_branches(options, count):
    convs = [Conv(options, seed=seed) for seed in range(count)]
    merged = add_branches([(conv.weight, conv.bias) for conv in convs])
    assert_same(sum(conv() for conv in convs), convs[0](*merged))


@given(conv_options(padding_modes=ZEROS), some, some, st.integers(1, 3), st.data())
def test_merge_1x1_kxk(options, bias1, bias2, factor, data):
    groups1, groups2 = options['groups'], data.draw(st.sampled_from((1, 2)))
    mid = factor * groups1 * groups2
    options['out_channels'] *= groups2
    first = {**options, 'out_channels': mid, 'kernel_size': (1, 1)}
    first = Conv(first, bias1)
    second = Conv({**options, 'in_channels': mid, 'groups': groups2}, bias2, seed=1)
    u = F.conv2d(first.x, first.weight, first.bias, groups=groups1)
    # Padded with what the 1x1 conv makes of a zero.
    rows, columns = options['padding']
    shift = 0 if first.bias is None else first.bias.reshape(1, -1, 1, 1)
    second.x = F.pad(u - shift, (columns, columns, rows, rows)) + shift
    merged = merge_convs(
        first.weight, first.bias, second.weight, second.bias, groups1, groups2
    )
    geometry = {**options, 'groups': math.gcd(groups1, groups2)}
    assert_same(second(padding=0), Conv(geometry, x=first.x)(*merged))


@given(conv_options(padding_modes=ZEROS), some, some, st.integers(1, 3), st.data())
def test_merge_kxk_1x1(options, bias1, bias2, factor, data):
    """Depthwise and pointwise among them."""
    groups1 = options['groups']
    groups2 = data.draw(st.sampled_from((1, 2, options['out_channels'])))
    outs = 2 * factor * options['out_channels']
    mid = options['out_channels'] = 2 * options['out_channels']
    first = Conv(options, bias1)
    weight = image(outs, mid // groups2, 1, 1, seed=5)
    bias = image(outs, seed=6) if bias2 else None
    expected = F.conv2d(first(), weight, bias, groups=groups2)
    merged = merge_convs(first.weight, first.bias, weight, bias, groups1, groups2)
    geometry = {**options, 'groups': math.gcd(groups1, groups2)}
    assert_same(expected, Conv(geometry, x=first.x)(*merged))


@pytest.mark.parametrize('kernels', [((1, 1), (2, 3)), ((2, 3), (1, 1))], ids=str)
def test_merge_in_all_groups(kernels):
    """Whichever way is the shortest for them: depthwise with a multiplier among them."""
    x = image(2, 4, 4, 5)
    for mid, out in itertools.product((4, 8), (2, 4, 8)):
        for groups1, groups2 in itertools.product((1, 2, 4), (1, 2, 4, 8)):
            if mid % groups2 or out % groups2:
                continue
            weight1 = image(mid, 4 // groups1, *kernels[0], seed=3)
            weight2 = image(out, mid // groups2, *kernels[1], seed=4)
            bias1, bias2 = image(mid, seed=5), image(out, seed=6)
            u = F.conv2d(x, weight1, bias1, groups=groups1)
            expected = F.conv2d(u, weight2, bias2, groups=groups2)
            merged = merge_convs(weight1, bias1, weight2, bias2, groups1, groups2)
            groups = math.gcd(groups1, groups2)
            assert_same(expected, F.conv2d(x, *merged, groups=groups))


@pytest.mark.parametrize(
    ('first', 'second', 'groups'),
    [
        ((4, 3, 3, 3), (2, 4, 3, 3), (1, 1)),
        ((4, 3, 1, 1), (2, 3, 3, 3), (1, 1)),
        ((4, 3, 1, 1), (2, 4, 3, 3), (2, 2)),
        ((4, 3, 1, 1), (3, 2, 3, 3), (2, 2)),
        ((4, 3, 1, 1), (2, 4, 3, 3), (3, 1)),
    ],
    ids=['none is 1x1', 'channels', 'groups', 'outputs and groups', 'first groups'],
)
def test_merge_refuses_what_does_not_chain(first, second, groups):
    with pytest.raises(ValueError, match=rf'cannot merge a kernel \({first[0]}, .*groups'):
        merge_convs(torch.ones(first), None, torch.ones(second), None, *groups)


@given(conv_options(padding_modes=ZEROS), st.sampled_from((1, 2)))
def test_widen_groups(options, merged):
    options = {**options, **{k: merged * options[k] for k in ('in_channels', 'groups')}}
    options['out_channels'] *= merged
    conv = Conv(options)
    weight = widen_groups(conv.weight, options['groups'], options['groups'] // merged)
    wide = Conv({**options, 'groups': options['groups'] // merged}, x=conv.x)
    assert_same(conv(), wide(weight, conv.bias))


@given(conv_options(padding_modes=ZEROS), st.sampled_from(((2, 1), (2, 3), (3, 3))))
def test_spread_of_a_dilated_kernel(options, step):
    """Over a kernel of smaller dilation, as UniRepLKNet's."""
    finer = options['dilation']
    dilation = tuple(d * s for d, s in zip(finer, step, strict=True))
    size = [n + 60 for n in options['size']]
    conv = Conv({**options, 'dilation': dilation, 'size': size})
    sizes = [(k - 1) * s + 1 for k, s in zip(options['kernel_size'], step, strict=True)]
    spread = pad_kernel(conv.weight, sizes, step=step)
    assert_same(conv(), conv(spread, conv.bias, dilation=finer))


@given(conv_options(padding_modes=ZEROS))
def test_average_kernel(options):
    conv = Conv(options)
    channels, groups = options['in_channels'], options['groups']
    weight = average_kernel(channels, options['kernel_size'], groups, torch.float64)
    # unfold lists the pixels under every tap.
    place = conv.place | {'kernel_size': options['kernel_size']}
    taps = F.unfold(conv.x, **place).unflatten(1, (channels, -1))
    assert_same(taps.mean(2), conv(weight).flatten(2))


@given(conv_options(padding_modes=ZEROS))
def test_identity_kernel(options):
    channels, groups = options['in_channels'], options['groups']
    x = image(2, channels, *options['size'])
    weight = identity_kernel(channels, groups, torch.float64)
    assert weight.shape == (channels, channels // groups, 1, 1)
    assert torch.equal(F.conv2d(x, weight, groups=groups), x)


@given(conv_options(padding_modes=ZEROS))
def test_constant_response(options):
    conv = Conv(options, bias=False)
    value = image(options['in_channels'])
    # As many pixels as there are taps, so that nothing is padded.
    places = zip(options['kernel_size'], options['dilation'], strict=True)
    size = (span(k, d) + 1 for k, d in places)
    conv.x = value.reshape(1, -1, 1, 1).expand(1, -1, *size)
    response = constant_response(conv.weight, value, conv.groups)
    assert_same(conv(padding=0).flatten(), response)


@given(conv_options(padding_modes=ZEROS), st.data())
def test_pad_kernel(options, data):
    """A conv with a padded kernel, whose taps reach over the input, is the conv."""
    conv = Conv(options)
    kernel_size, dilation = options['kernel_size'], options['dilation']
    before, after = (data.draw(st.tuples(*[st.integers(0, 3)] * 2)) for _ in range(2))
    size = tuple(b + k + a for b, k, a in zip(before, kernel_size, after, strict=True))
    expected = conv()
    weight = pad_kernel(conv.weight, size, before)
    assert weight.shape[2:] == size
    (top, bottom), (left, right) = (
        (pad + b * d, pad + a * d)
        for pad, b, a, d in zip(options['padding'], before, after, dilation, strict=True)
    )
    conv.x = F.pad(conv.x, (left, right, top, bottom))
    assert_same(expected, conv(weight, conv.bias, padding=0))
    if before == after:
        assert torch.equal(pad_kernel(conv.weight, size), weight)


def test_the_middle_of_a_larger_size():
    weight = image(2, 2, 1, 3)
    assert torch.equal(pad_kernel(weight, (3, 9)), F.pad(weight, (3, 3, 1, 1)))


@pytest.mark.parametrize(
    ('size', 'offset', 'message'),
    [
        ((4, 3), None, r'cannot be in the middle of \(4, 3\): give the offset'),
        ((3, 2), None, r'cannot be in the middle of \(3, 2\)'),
        ((1, 1), None, r'does not fit into \(1, 1\) at tap \(-1, -1\)'),
        ((5, 5), (3, 0), r'\(3, 3\) kernel, .*fit into \(5, 5\) at tap \(3, 0\)'),
        ((5, 5), (0, -1), r'does not fit into \(5, 5\) at tap \(0, -1\)'),
    ],
)
def test_pad_kernel_refuses_what_does_not_fit(size, offset, message):
    with pytest.raises(ValueError, match=message):
        pad_kernel(torch.ones(1, 1, 3, 3), size, offset)


@pytest.mark.parametrize('groups', [1, 2, 4], ids=['dense', 'grouped', 'depthwise'])
class TestElementaryFusions:
    """The four fusions of RepVGG, between 4 and 4 channels."""

    def convs(self, groups: int, count: int = 1, kernel_size: int = 3) -> list[Conv]:
        options = dict(in_channels=4, out_channels=4, groups=groups, size=(5, 6))
        options |= dict(stride=1, padding=kernel_size // 2, dilation=1)
        options['kernel_size'] = (kernel_size, kernel_size)
        return [Conv(options, bias=count > 1, seed=seed) for seed in range(count)]

    def norm_after(self, y: Tensor) -> Tensor:
        mean, var, eps, gamma, beta = batch_norm(4).values()
        return F.batch_norm(y, mean, var, gamma, beta, eps=eps)

    def test_conv3x3_norm(self, groups):
        (conv,) = self.convs(groups)
        fused = fuse_bn(conv.weight, None, **batch_norm(4))
        assert_same(self.norm_after(conv()), conv(*fused))

    def test_conv1x1_norm(self, groups):
        (conv,) = self.convs(groups, kernel_size=1)
        weight, bias = fuse_bn(conv.weight, None, **batch_norm(4))
        fused = pad_kernel(weight, (3, 3)), bias
        assert_same(self.norm_after(conv()), conv(*fused, padding=1))

    def test_norm(self, groups):
        (conv,) = self.convs(groups)
        identity = identity_kernel(4, groups, torch.float64)
        weight, bias = fuse_bn(identity, None, **batch_norm(4))
        fused = pad_kernel(weight, (3, 3)), bias
        assert_same(self.norm_after(conv.x), conv(*fused))

    def test_sum_of_convs(self, groups):
        convs = self.convs(groups, count=3)
        fused = add_branches([(conv.weight, conv.bias) for conv in convs])
        assert_same(sum(conv() for conv in convs), convs[0](*fused))


@pytest.mark.parametrize('pointwise_first', [True, False])
@pytest.mark.parametrize(
    ('groups', 'channels', 'sums'),
    [
        ((4, 4), (4, 4), False),
        ((1, 4), (4, 4), False),
        ((4, 4), (4, 8), False),
        ((4, 2), (4, 6), False),
        ((4, 2), (8, 4), True),
        ((1, 4), (4, 8), True),
        ((2, 1), (2, 4), True),
        ((2, 2), (4, 4), True),
    ],
)
def test_merge_of_a_depthwise_conv_is_a_product(groups, channels, sums, pointwise_first):
    """Of others it is a sum: a matrix product, or a conv where the 1x1 comes first."""
    (groups1, groups2), (mid, out), kernels = groups, channels, [(1, 1), (3, 3)]
    if not pointwise_first:
        kernels.reverse()
    weight1 = image(mid, 4 // groups1, *kernels[0], seed=3)
    weight2 = image(out, mid // groups2, *kernels[1], seed=4)
    with Calls() as calls:
        merge_convs(weight1, None, weight2, None, groups1, groups2)
    assert calls['conv2d'] == (sums and pointwise_first)
    assert calls['matmul'] == (sums and not pointwise_first)


def test_one_group_is_the_default():
    weight1, bias1 = image(4, 3, 1, 1), image(4, seed=2)
    weight2 = image(2, 4, 3, 3, seed=3)
    merged = merge_convs(weight1, bias1, weight2, None)
    assert_same(merge_convs(weight1, bias1, weight2, None, 1, 1), merged)
    response = constant_response(weight2, bias1)
    assert_same(constant_response(weight2, bias1, 1), response)
    for kernel in (identity_kernel(4), average_kernel(4, (1, 1))):
        assert_same(torch.eye(4), kernel.flatten(1))


def test_kernels_that_fit_are_not_copied():
    weight = image(4, 2, 3, 3)
    assert widen_groups(weight, 2, 2) is weight


def listed(pairs_of):
    """A function of tensors in the place of one of a list of pairs."""
    return lambda *tensors: pairs_of(list(zip(tensors[::2], tensors[1::2], strict=True)))


#: Every function of tensors, with the shapes of its arguments.
FUNCTIONS = {
    'fuse_bn': (
        lambda w, b, mean, var, gamma, beta: fuse_bn(w, b, mean, var, 0.1, gamma, beta),
        [(4, 2, 3, 3), *[(4,)] * 5],
    ),
    'add_branches': (listed(add_branches), [(4, 2, 3, 3), (4,)] * 3),
    'merge_convs': (
        lambda w1, b1, w2, b2: merge_convs(w1, b1, w2, b2, 2, 2),
        [(6, 2, 1, 1), (6,), (4, 3, 3, 2), (4,)],
    ),
    'merge_convs, depthwise': (
        lambda w1, b1, w2, b2: merge_convs(w1, b1, w2, b2, 6, 2),
        [(6, 1, 3, 2), (6,), (4, 3, 1, 1), (4,)],
    ),
    'widen_groups': (lambda w: widen_groups(w, 4, 2), [(8, 1, 3, 2)]),
    'constant_response': (
        lambda w, v: constant_response(w, v, 2),
        [(4, 3, 3, 2), (6,)],
    ),
    'bn_affine': (
        lambda mean, var, gamma, beta: bn_affine(mean, var, 0.1, gamma, beta),
        [(4,)] * 4,
    ),
    'pad_kernel': (lambda w: pad_kernel(w, (5, 4), (1, 1)), [(4, 2, 3, 3)]),
}


@pytest.fixture(params=FUNCTIONS)
def pure(request):
    """A function and tensors for it."""
    function, shapes = FUNCTIONS[request.param]
    tensors = [image(*shape, seed=i).square() for i, shape in enumerate(shapes)]
    return function, tensors


@pytest.mark.parametrize(
    ('dtype', 'device'),
    [
        (torch.float64, 'cpu'),
        (torch.float32, 'cpu'),
        (torch.bfloat16, 'cpu'),
        # Not every torch multiplies matrices of it on a CPU.
        (torch.float16, 'meta'),
    ],
    ids=str,
)
def test_keeps_dtype_and_device(pure, dtype, device):
    function, tensors = pure
    for tensor in as_tuple(function(*(t.to(device, dtype) for t in tensors))):
        assert tensor.dtype == dtype
        assert tensor.device.type == device


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """``outputs`` as a tuple."""
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def test_changes_no_argument(pure):
    function, tensors = pure
    before = [tensor.clone() for tensor in tensors]
    outputs = as_tuple(function(*tensors))
    for output in outputs:
        output.fill_(7)
    assert all(map(torch.equal, before, tensors))


def test_is_differentiable(pure):
    function, tensors = pure
    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in tensors])


@pytest.mark.parametrize(
    'kernel',
    [
        lambda **kw: identity_kernel(4, 2, **kw),
        lambda **kw: average_kernel(4, (2, 3), **kw),
    ],
    ids=['identity_kernel', 'average_kernel'],
)
def test_kernels_have_the_dtype_and_device_asked_for(kernel):
    assert kernel().dtype == torch.get_default_dtype()
    double = kernel(dtype=torch.float64, device='meta')
    assert double.dtype == torch.float64
    assert double.device.type == 'meta'


def test_average_kernel_is_exact_in_float64():
    assert average_kernel(1, (3, 7), dtype=torch.float64)[0, 0, 0, 0].item() == 1 / 21
