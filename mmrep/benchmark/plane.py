"""Draw the speed-accuracy plane."""

from collections.abc import Iterable
from pathlib import Path

import yaml

from .run import Benchmark

#: Points of the plane, in the order of drawing: name in the benchmark, label, style.
_FORMS = (
    ('mmrep', 'train form', dict(color='#b0b0b0', marker='o')),
    ('mmrep, deploy form', 'deploy form', dict(color='#1f6fb4', marker='o')),
    ('plain', 'plain network', dict(color='#c8601a', marker='s')),
)


def published_accuracy(config: str | Path) -> float | None:
    """The published top-1 accuracy of a config, in percent, by its ``metafile.yml``."""
    config = Path(config)
    metafile = config.parent / 'metafile.yml'
    if not metafile.is_file():
        return None
    for model in yaml.safe_load(metafile.read_text())['Models']:
        if Path(model['Config']).name == config.name:
            for result in model.get('Results') or []:
                for name, value in result['Metrics'].items():
                    if 'Top 1' in name:
                        return value
    return None


def draw_plane(points: Iterable[tuple[Benchmark, float]], path: str | Path) -> None:
    """Draw published accuracy over measured speed, as a picture.

    An arrow leads from the train form of each network to its deploy form, which is
    labelled. The plain network, where there was one, has no accuracy of its own and is
    drawn at the same height, hollow.

    Args:
        points: Benchmarks of the work ``'eval'``, and the top-1 accuracy of each.
        path: The file; its ending says the format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points = list(points)
    figure = Figure(figsize=(8, 5), layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for done, accuracy in points:
        speed = {t.name: done.shape[0] / t.median for t in done.timings if t.work == 'eval'}
        start, end = speed['mmrep'], speed['mmrep, deploy form']
        axes.annotate(
            '',
            (end, accuracy),
            (start, accuracy),
            arrowprops=dict(arrowstyle='->', color='#808080', shrinkA=4, shrinkB=4),
        )
        axes.annotate(
            done.config, (end, accuracy), (6, 4), textcoords='offset points', fontsize=8
        )
        for name, _, style in _FORMS:
            if name in speed:
                face = 'none' if name == 'plain' else style['color']
                axes.scatter(
                    speed[name],
                    accuracy,
                    zorder=3,
                    facecolor=face,
                    **{
                        'edgecolor': style['color'],
                        'marker': style['marker'],
                    },
                )
    for name, label, style in _FORMS:
        if any(t.name == name for done, _ in points for t in done.timings):
            axes.scatter([], [], label=label, **style)
    first = points[0][0]
    size = 'x'.join(map(str, first.shape[2:]))
    axes.set_xscale('log')
    axes.set_xlabel(f'images per second ({first.device}, batch {first.shape[0]}, {size})')
    axes.set_ylabel('published ImageNet top-1, %')
    axes.grid(alpha=0.3, which='both')
    axes.margins(x=0.15)
    axes.legend()
    figure.savefig(path, dpi=150)
