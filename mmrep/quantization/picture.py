"""A picture of the layers of a quantized graph."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .quantizing import Layer

#: Height of a layer's row, in inches.
_ROW = 0.2

_COLORS = {'int8': '#1f6fb4', 'fp32': '#c8601a'}


def _is_finite(sqnr: float | None) -> bool:
    return sqnr is not None and math.isfinite(sqnr)


def draw_layers(layers: Sequence['Layer'], path: str | Path) -> None:
    """Draw the weights' ranges of each layer, and what it costs to quantize it alone.

    Args:
        layers: The layers, from the first on.
        path: The PNG file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.6 + _ROW * len(layers)), layout='constrained')
    ranges, costs = figure.subplots(1, 2, sharey=True)
    for form, color in _COLORS.items():
        rows = [row for row, layer in enumerate(layers) if layer.form == form]
        if not rows:
            continue
        low, middle, high = zip(*(layers[row].ranges for row in rows), strict=True)
        ranges.hlines(rows, low, high, color=color, linewidth=3, alpha=0.5)
        ranges.scatter(middle, rows, color=color, s=16, zorder=3, label=form)
        known = [row for row in rows if _is_finite(layers[row].sqnr)]
        costs.barh(known, [layers[row].sqnr for row in known], color=color, height=0.7)
    ranges.set_yticks(range(len(layers)), [layer.name for layer in layers], fontsize=7)
    ranges.invert_yaxis()
    ranges.set_xscale('log')
    ranges.set_xlabel('max |w| of the output channels: smallest, median, largest')
    costs.set_xlabel('SQNR of the outputs with this layer alone in int8, dB')
    ranges.margins(y=0.02)
    figure.legend(loc='outside lower center', ncols=2, fontsize=8)
    figure.savefig(path, dpi=150, format='png')
