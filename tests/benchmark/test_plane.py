from pathlib import Path

import pytest
import yaml
from matplotlib.figure import Figure
from PIL import Image

from mmrep.benchmark import Benchmark, Timing, draw_plane, published_accuracy

CONFIGS = Path(__file__).parents[2] / 'configs'
TOP_1 = 'Published Top 1 Accuracy'


class TestPublishedAccuracy:
    def test_of_every_classifier_of_the_metafile(self):
        metafile = CONFIGS / 'repvgg' / 'metafile.yml'
        listed = {
            Path(model['Config']).name: result['Metrics'][TOP_1]
            for model in yaml.safe_load(metafile.read_text())['Models']
            for result in model.get('Results') or []
            if TOP_1 in result['Metrics']
        }
        assert len(listed) > 10
        for name, accuracy in listed.items():
            assert published_accuracy(metafile.parent / name) == accuracy
            assert 65 < accuracy < 90

    def test_a_config_that_is_not_listed(self, tmp_path):
        assert published_accuracy(CONFIGS / 'repvgg' / 'mine.py') is None
        assert published_accuracy(tmp_path / 'mine.py') is None

    def test_a_config_without_results(self, tmp_path):
        models = [dict(Config='configs/a.py'), dict(Config='configs/b.py', Results=None)]
        (tmp_path / 'metafile.yml').write_text(yaml.dump(dict(Models=models)))
        for name in ('a.py', 'b.py'):
            assert published_accuracy(tmp_path / name) is None


def result(config: str, plain: bool = False) -> Benchmark:
    result = Benchmark(config, 'a device', 'float32', (8, 3, 32, 32))
    names = ['mmrep', *(['plain'] if plain else []), 'mmrep, deploy form']
    result.timings = [
        Timing('train', 'mmrep', 9.0, 0.1),
        *(Timing('eval', name, 1.0 / (i + 1), 0.1) for i, name in enumerate(names)),
    ]
    return result


def test_labels_stay_inside(tmp_path, monkeypatch):
    """That of the fastest network ends at its point; the plain one has no accuracy."""
    figures = []
    savefig = Figure.savefig
    monkeypatch.setattr(
        Figure,
        'savefig',
        lambda figure, *args, **kwargs: (
            figures.append(figure),
            savefig(figure, *args, **kwargs),
        ),
    )
    slow, fast = result('a' * 40, plain=True), result('b' * 40)
    for timing in fast.timings:
        timing.median = timing.median / 50
    draw_plane([(slow, 72.5), (fast, 80.0)], tmp_path / 'plane.png')
    (axes,) = figures[0].axes
    left, right = axes.get_window_extent().intervalx
    labels = [text for text in axes.texts if text.get_text()]
    assert len(labels) == 2
    for text in labels:
        box = text.get_window_extent()
        assert left <= box.x0 and box.x1 <= right
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ['train form', 'deploy form']


@pytest.mark.parametrize('plain', [False, True])
def test_draw_plane(tmp_path, plain):
    points = [(result('first', plain), 72.5), (result('second'), 80.0)]
    # An iterator will do.
    draw_plane(iter(points), tmp_path / 'plane.png')
    with Image.open(tmp_path / 'plane.png') as picture:
        assert picture.format == 'PNG'
        assert min(picture.size) > 300
        assert len(picture.convert('RGB').getcolors(10**6)) > 10
