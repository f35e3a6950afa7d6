"""Draw the speed-accuracy plane."""

from collections.abc import Iterable
from pathlib import Path

import yaml

from mmrep.errors import UserError, reason

from .run import Benchmark

#: Style of the points by name in the benchmark, in the order of drawing.
_FORMS = {
    'mmrep': dict(label='train form', color='#b0b0b0', marker='o'),
    'mmrep, deploy form': dict(label='deploy form', color='#1f6fb4', marker='o'),
}


def published_accuracy(config: str | Path) -> float | None:
    """The published top-1 accuracy of a config, in percent, by its ``metafile.yml``.

    Raises:
        UserError: If the file exists, but is not a list of models.
    """
    config = Path(config)
    metafile = config.parent / 'metafile.yml'
    if not metafile.is_file():
        return None
    try:
        for model in yaml.safe_load(metafile.read_text())['Models']:
            if Path(model['Config']).name == config.name:
                for result in model.get('Results') or []:
                    for name, value in result['Metrics'].items():
                        if 'Top 1' in name:
                            return float(value)
    except (yaml.YAMLError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f'{metafile} is not a list of models ({reason(error)}): correct it'
        ) from error
    return None


def draw_plane(points: Iterable[tuple[Benchmark, float]], path: str | Path) -> None:
    """Draw published accuracy over measured speed, as a picture.

    An arrow leads from the train form of each network to its deploy form, which is
    labelled. The plain network has no published accuracy, and is left out.

    Args:
        points: Benchmarks of the task ``'eval'``, and the top-1 accuracy of each.
        path: The file; its suffix sets the format.
    """
    from matplotlib.figure import Figure

    benchmarks, accuracies = zip(*points, strict=True)
    speeds = [
        {t.name: result.shape[0] / t.median for t in result.timings if t.task == 'eval'}
        for result in benchmarks
    ]
    every = [value for speed in speeds for name, value in speed.items() if name in _FORMS]
    middle = (min(every) * max(every)) ** 0.5
    figure = Figure(figsize=(8, 5), layout='constrained')
    axes = figure.add_subplot()
    arrow = dict(arrowstyle='->', color='#808080', shrinkA=4, shrinkB=4)
    for result, speed, y in zip(benchmarks, speeds, accuracies, strict=True):
        start, end = (speed['mmrep'], y), (speed['mmrep, deploy form'], y)
        axes.annotate('', end, start, arrowprops=arrow)
        # Towards the middle, so that no label leaves the picture.
        right = speed['mmrep, deploy form'] > middle
        style = dict(ha='right' if right else 'left', fontsize=8)
        axes.annotate(result.config, end, (0, 7), textcoords='offset points', **style)
    for name, style in _FORMS.items():
        drawn = [(s[name], y) for s, y in zip(speeds, accuracies, strict=True) if name in s]
        if drawn:
            axes.scatter(*zip(*drawn, strict=True), zorder=3, **style)
    first = benchmarks[0]
    size = 'x'.join(map(str, first.shape[2:]))
    axes.set_xscale('log')
    axes.set_xlabel(f'images per second ({first.device}, batch {first.shape[0]}, {size})')
    axes.set_ylabel("published ImageNet top-1, %, at each config's own size")
    axes.grid(alpha=0.3, which='both')
    axes.margins(x=0.15, y=0.15)
    axes.legend()
    figure.savefig(path, dpi=150)
