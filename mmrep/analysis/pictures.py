"""Pictures of what branches do."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from mmrep.models.blocks import ReparamBlock

from .branches import BranchReport

#: Height of a block's bar, and width of a kernel's picture, in inches.
_BAR, _KERNEL = 0.22, 1.5

#: Kernels side by side.
_COLUMNS = 6

#: The most blocks in a picture that can be read; of more, every n-th is drawn.
_MOST = 60


def draw_shares(reports: Sequence[BranchReport], path: str | Path) -> None:
    """Draw the share of each branch in the kernel of its block, as bars.

    Args:
        reports: The blocks, from the first layer on.
        path: The PNG file.
    """
    from matplotlib.figure import Figure

    shown = _some(reports)
    branches = list(dict.fromkeys(branch for r in reports for branch in r.shares))
    figure = Figure(figsize=(9, 1.6 + _BAR * len(shown)), layout='constrained')
    axes = figure.add_subplot()
    left = [0.0] * len(shown)
    for branch in branches:
        widths = [100 * report.shares.get(branch, 0.0) for report in shown]
        axes.barh([r.name for r in shown], widths, left=left, height=0.8, label=branch)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.margins(y=0.01)
    axes.tick_params(labelsize=8)
    axes.set_xlabel("share of the branches' kernels, by Frobenius norm, %")
    axes.set_title(_title(reports, shown, 'What each branch adds'), fontsize=10)
    figure.legend(loc='outside lower center', ncols=len(branches), fontsize=8)
    figure.savefig(path, dpi=150, format='png')


def draw_kernels(reports: Sequence[BranchReport], path: str | Path) -> None:
    """Draw the mean absolute kernel of each block, with the largest tap as 1.

    The first picture is the mean over all blocks with the most frequent kernel size.

    Args:
        reports: The blocks.
        path: The PNG file.
    """
    sizes = [tuple(report.skeleton.shape) for report in reports]
    size = max(sorted(set(sizes)), key=sizes.count)
    alike = [r for r, own in zip(reports, sizes, strict=True) if own == size]
    mean = torch.stack([_scaled(report.skeleton) for report in alike]).mean(0)
    shown = _some(reports)
    pictures = [
        (f'mean of {len(alike)}', mean),
        *((report.name, _scaled(report.skeleton)) for report in shown),
    ]
    title = _title(reports, shown, 'Equivalent kernels')
    _draw_tiles(pictures, title, path)


@torch.no_grad()
def draw_branch_kernels(block: ReparamBlock, path: str | Path) -> None:
    """Draw the mean absolute kernel of each branch of a block, and of their sum.

    All have one scale, with the largest tap as 1.

    Args:
        block: The block, in train form.
        path: The PNG file.
    """
    kernels = block.branch_kernels(dtype=torch.float64)
    kernels['sum'] = torch.stack([*kernels.values()]).sum(0)
    skeletons = {name: kernel.abs().mean((0, 1)) for name, kernel in kernels.items()}
    scale = max(skeleton.max() for skeleton in skeletons.values())
    pictures = [(name, skeleton / scale) for name, skeleton in skeletons.items()]
    _draw_tiles(pictures, type(block).__name__, path)


def _draw_tiles(
    pictures: Sequence[tuple[str, torch.Tensor]], title: str, path: str | Path
) -> None:
    """Draw named mean absolute kernels beside each other, from 0 to 1."""
    from matplotlib.figure import Figure

    rows = math.ceil(len(pictures) / _COLUMNS)
    columns = min(_COLUMNS, len(pictures))
    figure = Figure(
        figsize=(_KERNEL * columns + 1, (_KERNEL + 0.3) * rows + 0.6), layout='constrained'
    )
    grid = figure.subplots(rows, columns, squeeze=False).flat
    image = None
    for axes, (name, kernel) in zip(grid, pictures, strict=False):
        image = axes.imshow(kernel.numpy(), vmin=0, vmax=1, cmap='viridis')
        axes.set_title(_shortened(name), fontsize=7)
        if max(kernel.shape) <= 5:
            for (row, column), value in zip(
                torch.cartesian_prod(*map(torch.arange, kernel.shape)).tolist(),
                kernel.flatten().tolist(),
                strict=True,
            ):
                color = 'white' if value < 0.6 else 'black'
                style = dict(ha='center', va='center', fontsize=6, color=color)
                axes.text(column, row, f'{value:.2f}', **style)
    for axes in figure.axes:
        axes.set_axis_off()
    figure.colorbar(image, ax=figure.axes, shrink=0.6, label='mean |W|, largest tap = 1')
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150, format='png')


def _scaled(skeleton: torch.Tensor) -> torch.Tensor:
    """Scale a kernel so that its largest tap is 1; zeros stay zeros."""
    return skeleton / skeleton.max().clamp(min=torch.finfo(skeleton.dtype).tiny)


def _some(reports: Sequence[BranchReport]) -> list[BranchReport]:
    """At most ``_MOST`` reports, evenly apart."""
    step = math.ceil(len(reports) / _MOST)
    return list(reports[::step])


def _title(reports: Sequence, shown: Sequence, what: str) -> str:
    some = '' if len(shown) == len(reports) else f', {len(shown)} of {len(reports)} blocks'
    return f'{what}{some}'


def _shortened(name: str) -> str:
    return name if len(name) <= 24 else f'…{name[-23:]}'
