"""Pictures of blocks: their branches, and the one conv that these become."""

from collections.abc import Iterator
from pathlib import Path

from mmcv.cnn.bricks.scale import LayerScale
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmrep.models.blocks import ReparamBlock
from mmrep.models.layers import ChannelBias, CosineFilters, IdentityConv1x1, PadOrCrop

#: A box's label and its kind.
Box = tuple[str, str]

_COLORS = dict(
    conv='#cfe2f3', norm='#fce5cd', fixed='#d9ead3', scale='#d9d2e9', other='#eeeeee'
)
#: Width of a box, and distance from a box to the one below it, in inches.
_WIDTH, _APART = 1.15, 0.48


def branch_boxes(branch: nn.Module) -> list[Box]:
    """The layers of a branch, from the first on, as labels and kinds.

    A kind is ``'conv'``, ``'norm'``, ``'fixed'`` (nothing is trained), ``'scale'``
    or ``'other'``.
    """
    return list(_boxes(branch))


def _boxes(layer: nn.Module) -> Iterator[Box]:
    if isinstance(layer, PadOrCrop):
        # It only aligns a branch with the others, so it is not drawn.
        return
    if isinstance(layer, nn.Conv2d):
        yield _conv_label(layer), 'conv'
    elif isinstance(layer, IdentityConv1x1):
        yield '1x1 + identity', 'conv'
    elif isinstance(layer, _BatchNorm):
        yield 'norm', 'norm'
    elif isinstance(layer, nn.Identity):
        yield 'identity', 'fixed'
    elif isinstance(layer, CosineFilters):
        yield 'cosines', 'fixed'
    elif isinstance(layer, LayerScale):
        yield 'scale', 'scale'
    elif isinstance(layer, ChannelBias):
        yield 'bias', 'scale'
    elif isinstance(layer, ReparamBlock):
        yield type(layer).__name__.removesuffix('Block'), 'other'
    elif 'AvgPool' in type(layer).__name__:
        yield 'average', 'fixed'
    elif children := list(layer.children()):
        for child in children:
            yield from _boxes(child)
    else:
        yield type(layer).__name__, 'other'


def _conv_label(conv: nn.Conv2d) -> str:
    label = 'x'.join(map(str, conv.kernel_size))
    if conv.groups > 1 and conv.groups == conv.in_channels:
        label += ' depthwise'
    if max(conv.dilation) > 1:
        label += f'\ndilation {max(conv.dilation)}'
    return label


def draw_block(block: ReparamBlock, path: str | Path) -> None:
    """Draw a block in both forms, as an SVG file.

    Args:
        block: The block, in train form.
        path: The file.

    Raises:
        ValueError: If the block is in deploy form.
    """
    if block.deploy:
        raise ValueError(f'{type(block).__name__} is in deploy form: it has no branches')
    import matplotlib as mpl
    from matplotlib.figure import Figure

    branches = [branch_boxes(branch) for branch in block.branches().values()]
    tail = [('norm', 'norm')] if block.post_norm is not None else []
    tail += [(type(block.act).__name__, 'other')] if block.act is not None else []
    if block.se_cfg is not None:
        before = block.se_position == 'before_act' and block.act is not None
        tail.insert(len(tail) - before, ('SE', 'other'))
    longest = max(map(len, branches))
    columns = len(branches)
    rows = longest + len(tail) + 1
    one_conv = columns + 1.1
    width, height = (one_conv + 1) * (_WIDTH + 0.15), (rows + 1) * _APART + 0.25
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(-0.6, one_conv + 0.6)
    axes.set_ylim(rows + 0.75, -0.85)
    axes.set_axis_off()

    def box(x: float, y: float, label: str, kind: str) -> None:
        style = dict(boxstyle='round,pad=0.3', facecolor=_COLORS[kind], edgecolor='#555555')
        axes.text(x, y, label, ha='center', va='center', fontsize=8, bbox=style)

    def line(*points: tuple[float, float]) -> None:
        axes.plot(*zip(*points, strict=True), color='#555555', linewidth=0.8, zorder=0)

    middle = (columns - 1) / 2
    for x, boxes in enumerate(branches):
        line((middle, -0.6), (x, -0.3), (x, longest), (middle, longest))
        for y, (label, kind) in enumerate(boxes):
            box(x, y + (longest - len(boxes)) / 2, label, kind)
    box(middle, longest, '+', 'other')
    line((middle, longest), (middle, rows + 0.4))
    size = 'x'.join(map(str, block.kernel_size))
    line((one_conv, -0.6), (one_conv, rows + 0.4))
    box(one_conv, (longest - 1) / 2, f'{size} and bias', 'conv')
    for y, (label, kind) in enumerate(tail, longest + 1):
        box(middle, y, label, kind)
        if kind != 'norm':
            box(one_conv, y, label, kind)
    for x in (middle, one_conv):
        axes.text(x, -0.72, 'x', ha='center', va='center', fontsize=8)
        axes.text(x, rows + 0.55, 'y', ha='center', va='center', fontsize=8)
    between = (longest - 1) / 2
    axes.annotate(
        '',
        xy=(one_conv - 0.5, between),
        xytext=(columns - 0.45, between),
        arrowprops=dict(arrowstyle='->', color='#555555'),
    )
    with mpl.rc_context({'svg.fonttype': 'none', 'svg.hashsalt': 'mmrep'}):
        figure.savefig(path, format='svg', metadata={'Date': None})
