"""Convolutions of all kinds, for hypothesis."""

from hypothesis import strategies as st

#: Input channels, output channels and groups: depthwise ones and ``groups == out != in``.
CHANNELS = ((3, 4, 1), (4, 4, 1), (4, 6, 2), (4, 4, 2), (4, 4, 4), (4, 2, 2), (2, 4, 2))
PADDING_MODES = ('zeros', 'reflect', 'replicate', 'circular')

kernel_sizes = st.tuples(st.integers(1, 7), st.integers(1, 7))
strides = st.tuples(st.integers(1, 3), st.integers(1, 3))
dilations = st.tuples(st.integers(1, 3), st.integers(1, 3))
channels = st.sampled_from(CHANNELS)


def span(kernel_size: int, dilation: int) -> int:
    """Pixels from the first tap to the last."""
    return (kernel_size - 1) * dilation


@st.composite
def conv_options(draw, kernels=kernel_sizes, padding_modes=PADDING_MODES) -> dict:
    """Arguments of a conv with an input: ``in_channels`` to ``padding_mode``, ``size``."""
    kernel_size, stride, dilation = draw(kernels), draw(strides), draw(dilations)
    spans = [span(k, d) for k, d in zip(kernel_size, dilation, strict=True)]
    # Half the time what keeps the size; blocks are built with that.
    keeps = all(pixels % 2 == 0 for pixels in spans) and draw(st.booleans())
    padding = tuple(
        pixels // 2 if keeps else draw(st.integers(0, pixels // 2 + 1)) for pixels in spans
    )
    # A reflection needs more pixels than it pads.
    size = tuple(
        max(pixels + 1 - 2 * pad, pad + 1, 1) + draw(st.integers(1, 5))
        for pixels, pad in zip(spans, padding, strict=True)
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
