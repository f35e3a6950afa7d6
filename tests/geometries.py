"""Hypothesis strategies for the geometries of convs."""

from collections.abc import Callable, Sequence

from hypothesis import strategies as st

#: (in, out, groups): among them depthwise convs, and ``groups == out != in``.
CHANNELS = ((3, 4, 1), (4, 4, 1), (4, 6, 2), (4, 4, 2), (4, 4, 4), (4, 2, 2), (2, 4, 2))
PADDING_MODES = ('zeros', 'reflect', 'replicate', 'circular')

kernel_sizes = st.tuples(st.integers(1, 7), st.integers(1, 7))
strides = st.tuples(st.integers(1, 3), st.integers(1, 3))
dilations = st.tuples(st.integers(1, 3), st.integers(1, 3))
channels = st.sampled_from(CHANNELS)


def span(kernel_size: int, dilation: int) -> int:
    """The distance in pixels from the first tap to the last."""
    return (kernel_size - 1) * dilation


def padding_and_size(
    spans: Sequence[int], choose: Callable[[int, int], int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A padding and a size of the input for a kernel with the given spans.

    Args:
        spans: :func:`span` over rows and over columns.
        choose: ``choose(least, most)`` gives a number between these, both included.
    """
    # In half of the cases the padding that keeps the size, as blocks have it.
    keeps = all(pixels % 2 == 0 for pixels in spans) and choose(0, 1)
    padding = tuple(
        pixels // 2 if keeps else choose(0, pixels // 2 + 1) for pixels in spans
    )
    # A reflection needs more pixels than it pads.
    size = tuple(
        max(pixels + 1 - 2 * pad, pad + 1, 1) + choose(1, 5)
        for pixels, pad in zip(spans, padding, strict=True)
    )
    return padding, size


@st.composite
def conv_options(draw, kernels=kernel_sizes, padding_modes=PADDING_MODES) -> dict:
    """Arguments of a conv, ``in_channels`` to ``padding_mode``, and an input's ``size``."""
    kernel_size, stride, dilation = draw(kernels), draw(strides), draw(dilations)
    spans = [span(k, d) for k, d in zip(kernel_size, dilation, strict=True)]
    padding, size = padding_and_size(
        spans, lambda least, most: draw(st.integers(least, most))
    )
    ins, outs, groups = draw(channels)
    return dict(
        in_channels=ins,
        out_channels=outs,
        kernel_size=kernel_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=draw(st.sampled_from(padding_modes)),
        size=size,
    )
