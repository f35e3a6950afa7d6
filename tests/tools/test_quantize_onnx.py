"""tools/quantize_onnx.py."""

import json
import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tool_runs import load, succeed, tool, variant

from mmrep.quantization import Layer, QuantizedOnnx, Recipe

onnxruntime = pytest.importorskip('onnxruntime')

ROOT = Path(__file__).parents[2]
FAST = ['--samples', '3', '--method', 'minmax', '--per-channel', 'yes']


def rows(printed: str) -> list[list[str]]:
    """The cells of the tables' lines, and the words of the others."""
    return [line.split() for line in printed.replace('│', ' ').splitlines()]


@pytest.mark.parametrize('kind', ['classifier', 'segmentor'])
def test_tables_and_files(request, tmp_path, kind):
    project = request.getfixturevalue(kind)
    options = [*FAST, '--allow-drop', '--exclude', '*stem*', '*stage_4*', '--equalize']
    out = tmp_path / 'int8.onnx'
    done = tool('quantize_onnx', *options, '--', project.config, project.checkpoint, out)
    printed = rows(succeed(done))
    assert sorted(os.listdir(tmp_path)) == ['int8.json', 'int8.onnx', 'int8.png']
    record = json.loads((tmp_path / 'int8.json').read_text())
    assert record['source'] == project.checkpoint.name
    int8 = record['int8']
    sqnr = f'{next(iter(int8["recipes"].values())):.1f}'
    assert ['minmax,', 'per', 'channel', sqnr] in printed
    assert ['convs', 'equalized:', str(int8['equalized'])] in printed
    for layer in int8['layers']:
        figures = [f'{value:.3g}' for value in layer['ranges']]
        (row,) = [row for row in printed if row[1:5] == [layer['form'], *figures]]
        assert layer['name'].startswith(row[0])
        assert row[5:] == ([] if layer['sqnr'] is None else [f'{layer["sqnr"]:.1f}'])
    size = len(int8['layers'])
    kept = sum(layer['form'] == 'fp32' for layer in int8['layers'])
    assert kept >= 2
    for form, count in (('fp32', size), ('int8', size - kept)):
        metrics = [f'{value:.2f}' for value in int8['metrics'][form].values()]
        figures = [*metrics, f'{int8["sizes"][form]:,}']
        latency = f'{1e3 * int8["latencies"][form]:.2f}'
        assert [form, *figures, latency, str(count)] in printed
    metric = 'accuracy/top1' if kind == 'classifier' else 'mIoU'
    ((_, lost),) = int8['drops'].items()
    words = f'{metric} lost with {kept} layers left in fp32: {lost:.2f}'
    assert words.split() in printed
    assert printed[-3] == ['written:', str(out)]


def test_what_has_no_metric(capsys):
    """A detector, say, loses none."""
    done = QuantizedOnnx(
        *(Path(f'a.{suffix}') for suffix in ('onnx', 'png', 'json')),
        recipe=Recipe('minmax', True),
        recipes={Recipe('minmax', True): 30.0},
        samples=4,
        equalized=None,
        metric=None,
        metrics=dict(fp32={}, int8={}),
        outputs={'output_0': (30.0, 0.9)},
        drops={0: 0.0},
        sizes=dict(fp32=8, int8=2),
        latencies=dict(fp32=1.0, int8=0.5),
        layers=[Layer('backbone', 'int8', (1.0, 2.0, 3.0), 30.0)],
    )
    load('quantize_onnx').show(Console(width=200), done)
    printed = capsys.readouterr().out
    assert 'judged by its raw outputs' in printed and 'on the calibration images' in printed
    assert 'None' not in printed and 'lost' not in printed


@pytest.mark.parametrize(
    ('options', 'entries', 'says'),
    [
        (['--metric', 'mIoU'], {}, 'gives no mIoU: choose --metric from accuracy/top1'),
        (
            ['--exclude', 'heads*'],
            {},
            '--exclude heads* matches no layer: choose from back',
        ),
        (['--shape', '32'], {}, 'give a fitting --shape, or --dynamic'),
        ([], dict(train_dataloader=None), 'no train_dataloader.dataset, whose images int8'),
        ([], dict(val_evaluator=None), 'no val_evaluator, by which the loss of int8'),
        (
            [],
            {'train_dataloader.dataset.data_root': '/no/such/folder'},
            '/no/such/folder/train does not exist: check the path',
        ),
        (
            [],
            {'val_dataloader.dataset.type': 'NoSuchDataset'},
            "type='NoSuchDataset' is unknown to mmpretrain",
        ),
        ([], {'val_evaluator.type': 'NoSuchMetric'}, "type='NoSuchMetric' is unknown"),
        (['--opset', '99'], {}, 'try another --opset'),
    ],
)
def test_wrong_input(classifier, tmp_path, refused, options, entries, says):
    config = variant(classifier.config, tmp_path, **entries)
    out = tmp_path / 'out' / 'a.onnx'
    arguments = [config, classifier.checkpoint, out, *FAST, *options]
    refused('quantize_onnx', *arguments, says=says)
    assert not out.parent.exists()


@pytest.mark.parametrize(
    'options',
    [
        ['--max-drop', '-1'],
        ['--max-drop', 'nan'],
        ['--max-drop', 'much'],
        ['--samples', '0'],
        ['--method', 'entropy'],
        ['--per-channel', 'maybe'],
    ],
)
def test_wrong_options(call, capsys, options):
    with pytest.raises(SystemExit) as info:
        call('quantize_onnx', 'a.py', 'a.pth', 'a.onnx', *options)
    assert info.value.code == 2
    assert f'argument {options[0]}' in capsys.readouterr().err


def test_a_larger_loss_ends_the_tool(classifier, tmp_path, refused, monkeypatch):
    from mmrep.quantization.judging import MetricJudge

    real = MetricJudge.__call__

    def worse(judge, int8):
        judgement = real(judge, int8)
        return type(judgement)(judgement.outputs, judgement.metrics, 7.0)

    monkeypatch.setattr(MetricJudge, '__call__', worse)
    out = tmp_path / 'new' / 'a.onnx'
    arguments = [*FAST, classifier.config, classifier.checkpoint, out]
    refused('quantize_onnx', *arguments, says=('loses 7.00 of', '--max-drop 0.5'))
    assert not out.parent.exists()


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    """A folder with the digits, and a network in deploy form that knows them."""
    folder = tmp_path_factory.mktemp('digits')
    (folder / 'configs').symlink_to(ROOT / 'configs')
    config = 'configs/repvgg/repvgg-tiny_1xb64_digits.py'
    succeed(tool('dataset_converters/digits', 'data/digits', cwd=folder))
    succeed(tool('train', config, '--work-dir', 'work', cwd=folder))
    succeed(tool('reparam', config, 'work/epoch_15.pth', 'deploy.pth', cwd=folder))
    return folder


@pytest.mark.long
class TestDigits:
    """Real images and a trained network."""

    def quantize(self, folder, checkpoint: str, *options: str) -> tuple[float, dict]:
        """What int8 loses, and the record."""
        arguments = ['deploy.py', checkpoint, 'int8.onnx', '--overwrite', *options]
        pair = ['--cfg-options', 'fused_checkpoint=None']
        succeed(tool('quantize_onnx', *arguments, *pair, cwd=folder))
        int8 = json.loads((folder / 'int8.json').read_text())['int8']
        fp32, quantized = (int8['metrics'][f]['accuracy/top1'] for f in ('fp32', 'int8'))
        assert fp32 > 97
        return fp32 - quantized, int8

    def test_next_to_nothing_is_lost(self, digits):
        lost, int8 = self.quantize(digits, 'deploy.pth')
        assert lost <= 0.5 and int8['samples'] == 128
        assert all(layer['form'] == 'int8' for layer in int8['layers'])

    def test_equalizing_saves_what_collapses(self, digits):
        """One channel of each conv times 100, and the next conv's divided by it."""
        checkpoint = torch.load(digits / 'deploy.pth', weights_only=True)
        weights = checkpoint['state_dict']
        names = [key for key in weights if key.endswith('branch_reparam.weight')]
        for i, (first, second) in enumerate(pairwise(names)):
            channel = 3 * i % len(weights[first])
            weights[first][channel] *= 100
            weights[first.replace('weight', 'bias')][channel] *= 100
            weights[second][:, channel] /= 100
        torch.save(dict(state_dict=weights), digits / 'collapsed.pth')
        per_tensor = ['--method', 'minmax', '--per-channel', 'no', '--max-drop', '100']
        lost, _ = self.quantize(digits, 'collapsed.pth', *per_tensor)
        assert lost > 10
        lost, int8 = self.quantize(digits, 'collapsed.pth', *per_tensor, '--equalize')
        assert lost < 1 and int8['equalized'] == len(names) - 1
