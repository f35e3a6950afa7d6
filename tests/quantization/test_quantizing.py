"""From a config and a checkpoint to an int8 file."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from detectors import faster_rcnn, retinanet
from laws import randomise
from mmengine.config import Config
from tiny_projects import HEIGHT, WIDTH, write_classification, write_segmentation

pytest.importorskip('onnxruntime')

import onnx
import onnxruntime

from mmrep.checkpoints import sha256_of
from mmrep.deployment import build_model, deploy_checkpoint, enter_scope, read_config
from mmrep.errors import UserError
from mmrep.hosts import forward
from mmrep.quantization import Recipe, quantize_onnx, quantizing, source
from mmrep.quantization.judging import Judgement
from mmrep.reparam import compare_tensors

LAYERS = [
    *(f'backbone.{name}.branch_reparam' for name in ('stem', 'stage_1.0', 'stage_2.0')),
    *(f'backbone.stage_{name}.branch_reparam' for name in ('2.1', '3.0', '4.0')),
]


class Network:
    """A tiny project with random weights."""

    def __init__(self, root: Path, write: Callable) -> None:
        self.path = write(root)
        self.checkpoint = root / 'net.pth'
        self.out = root / 'out' / 'net.onnx'
        self.config = read_config(self.path)
        torch.manual_seed(0)
        self.model = randomise(build_model(self.config)).eval()
        torch.save(dict(state_dict=self.model.state_dict()), self.checkpoint)

    def quantize(self, **options):
        options = dict(samples=4, max_drop=100, source_config=self.path) | options
        return quantize_onnx(self.config, self.checkpoint, self.out, **options)

    @property
    def files(self) -> list[str]:
        """What is in the folder that is written to."""
        folder = self.out.parent
        return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.fixture
def classifier(tmp_path):
    pytest.importorskip('mmpretrain')
    return Network(tmp_path, write_classification)


@pytest.fixture
def segmentor(tmp_path):
    pytest.importorskip('mmcv.ops')
    pytest.importorskip('mmseg')
    return Network(tmp_path, write_segmentation)


def run(path: Path, image: np.ndarray) -> np.ndarray:
    (found,) = onnxruntime.InferenceSession(path).run(None, {'input': image})
    return found


def test_classifier(classifier):
    done = classifier.quantize(method='minmax', per_channel=True)
    assert classifier.files == ['net.json', 'net.onnx', 'net.png']
    assert [layer.name for layer in done.layers] == [*LAYERS, 'head.fc']
    assert {layer.form for layer in done.layers} == {'int8'} and done.left == []
    for layer in done.layers:
        low, middle, high = layer.ranges
        assert 0 < low <= middle <= high and layer.sqnr > 15
    assert done.recipe == Recipe('minmax', True) and list(done.recipes) == [done.recipe]
    assert done.metric == 'accuracy/top1' and done.samples == 4 and done.equalized is None
    drop = done.metrics['fp32'][done.metric] - done.metrics['int8'][done.metric]
    assert done.drops == {0: drop}
    assert done.sizes['int8'] < done.sizes['fp32']
    assert min(done.latencies.values()) > 0

    # It is close to the checkpoint's model, and no closer than int8 can be.
    rng = np.random.default_rng(0)
    image = rng.uniform(-2, 1, (1, 3, HEIGHT, WIDTH)).astype(np.float32)
    found = torch.from_numpy(run(done.out, image))
    error = compare_tensors(forward(classifier.model, torch.from_numpy(image)), found)
    assert 1e-4 < error.rel_l2 < 0.2
    sqnr, agreement = done.outputs['output']
    assert 15 < sqnr < 60 and agreement > 0.6
    types = {t.data_type for t in onnx.load(done.out).graph.initializer}
    assert onnx.TensorProto.INT8 in types and onnx.TensorProto.UINT8 in types

    record = json.loads(done.record.read_text())
    (said,) = onnx.load(done.out).metadata_props
    assert said.key == 'mmrep' and json.loads(said.value) == record
    assert record['source_sha256'] == sha256_of(classifier.checkpoint)
    assert record['source_config'] == classifier.path.name and record['form'] == 'deploy'
    int8 = record['int8']
    assert int8['recipe'] == dict(method='minmax', per_channel=True)
    assert int8['metrics'] == done.metrics
    assert [layer['name'] for layer in int8['layers']] == [
        layer.name for layer in done.layers
    ]
    assert record['options'] == dict(
        max_drop=100, allow_drop=False, exclude=[], reduce_range=False
    )
    assert int8['versions']['onnxruntime'] == onnxruntime.__version__
    assert done.picture.read_bytes().startswith(b'\x89PNG')


def test_segmentor_with_all_options(segmentor):
    done = segmentor.quantize(
        exclude=['*conv_seg', '*stage_2*'],
        equalized=True,
        metric='aAcc',
        dynamic=True,
        opset=13,
        shape=(3, 32, 32),
        samples=3,
    )
    assert set(done.recipes) == {
        Recipe(m, c) for m in ('minmax', 'percentile') for c in (True, False)
    }
    assert done.recipe == max(done.recipes, key=done.recipes.get)
    stage_2 = [name for name in LAYERS if 'stage_2' in name]
    assert set(done.left) == {'decode_head.conv_seg', *stage_2}
    alone = {layer.name: layer.sqnr for layer in done.layers}
    assert all((alone[name] is None) == (name in done.left) for name in alone)
    assert done.equalized == 7 and done.metric == 'aAcc' and done.samples == 3
    assert set(done.metrics['int8']) == {'aAcc', 'mIoU', 'mAcc'}
    assert onnx.load(done.out).opset_import[0].version == 13
    for shape in ((2, 3, 24, 16), (1, 3, 40, 33)):
        x = torch.randn(shape)
        error = compare_tensors(
            forward(segmentor.model, x), torch.from_numpy(run(done.out, x.numpy()))
        )
        assert error.rel_l2 < 0.3


def test_all_forms_of_a_checkpoint(classifier, tmp_path):
    """Train, deploy and host form are quantized to the same function."""
    options = dict(method='minmax', per_channel=True)
    image = np.ones((1, 3, HEIGHT, WIDTH), np.float32)
    train = run(classifier.quantize(**options).out, image)
    for host in (False, True):
        out = tmp_path / f'host-{host}.pth'
        deploy_checkpoint(classifier.config, classifier.checkpoint, out, host=host)
        config = read_config(out.with_suffix('.py'))
        done = quantize_onnx(
            config, out, tmp_path / f'{host}.onnx', samples=4, max_drop=100, **options
        )
        np.testing.assert_allclose(run(done.out, image), train, rtol=0.05, atol=0.05)


def losing(drops: dict[int, float], fp32: float = 90.0) -> type:
    """A judge that finds these losses, by the number of layers in fp32."""

    class Judge:
        reference, metric = {'accuracy/top1': fp32}, 'accuracy/top1'
        asked: list[int] = []

        def __init__(self, evaluation, graph, track) -> None:
            pass

        def __call__(self, int8: onnx.ModelProto) -> Judgement:
            quantized = [
                t for t in int8.graph.initializer if t.name.endswith('weight_quantized')
            ]
            left = len(LAYERS) + 1 - len(quantized)
            self.asked.append(left)
            drop = drops[left]
            return Judgement({}, {'accuracy/top1': fp32 - drop}, drop)

    return Judge


def test_fewest_layers_are_left_in_fp32(classifier, monkeypatch):
    judge = losing({0: 9.0, 1: 3.0, 2: 0.6, 3: 0.4})
    monkeypatch.setattr(source, 'MetricJudge', judge)
    done = classifier.quantize(max_drop=0.5)
    assert done.drops == {0: 9.0, 1: 3.0, 2: 0.6, 3: 0.4}
    worst = sorted(done.layers, key=lambda layer: layer.sqnr)[:3]
    assert set(done.left) == {layer.name for layer in worst}
    assert done.metrics['int8'] == {'accuracy/top1': 89.6}
    floats = [
        t.name
        for t in onnx.load(done.out).graph.initializer
        if t.name.endswith('weight') and t.data_type == onnx.TensorProto.FLOAT
    ]
    assert len(floats) == 3
    # Nothing is judged twice.
    assert sorted(judge.asked) == [0, 1, 2, 3]


def test_rounding_of_a_metric_is_no_loss(classifier, monkeypatch):
    """A difference of means in float32 may be a little more than it should be."""
    monkeypatch.setattr(source, 'MetricJudge', losing({0: 0.50001}))
    assert classifier.quantize(max_drop=0.5).left == []


def test_a_larger_loss_is_one_sentence(classifier, monkeypatch):
    monkeypatch.setattr(source, 'MetricJudge', losing({0: 9.0, 1: 3.0, 2: 0.7, 3: 0.8}))
    says = (
        r'^int8 \(.*\) loses 9.00 of 90.00 accuracy/top1, and at best 0.70, with 2 layers '
        r'left in fp32, which is more than --max-drop 0.5: nothing was '
    )
    with pytest.raises(UserError, match=says):
        classifier.quantize(max_drop=0.5)
    assert classifier.files == []
    done = classifier.quantize(max_drop=0.5, allow_drop=True)
    assert len(done.left) == 2 and done.drops[2] == 0.7
    assert len(classifier.files) == 3


def test_a_metric_that_is_no_number_is_a_loss(classifier, monkeypatch):
    nan = dict.fromkeys(range(4), math.inf)
    monkeypatch.setattr(source, 'MetricJudge', losing(nan))
    with pytest.raises(UserError, match=r'loses inf of 90\.00 accuracy/top1'):
        classifier.quantize(max_drop=0.5)


def test_the_record_is_json(classifier, monkeypatch):
    """An SQNR of infinity is not."""
    real = quantizing.Search.layers

    def layers(*args):
        return dict.fromkeys(real(*args), math.inf)

    monkeypatch.setattr(quantizing.Search, 'layers', layers)
    done = classifier.quantize()

    def refuse(constant):
        raise AssertionError(constant)

    record = json.loads(done.record.read_text(), parse_constant=refuse)
    assert {layer['sqnr'] for layer in record['int8']['layers']} == {None}


def test_what_is_excluded_is_not_counted_twice(classifier, monkeypatch):
    monkeypatch.setattr(source, 'MetricJudge', losing({2: 9.0, 3: 0.1}))
    done = classifier.quantize(max_drop=0.5, exclude=['*stage_2*'])
    assert len(done.left) == 3 and done.drops == {2: 9.0, 3: 0.1}


@pytest.mark.parametrize('name', ['net.onnx', 'net.json', 'net.png'])
def test_existing_files(classifier, name):
    classifier.out.parent.mkdir()
    existing = classifier.out.parent / name
    existing.write_text('old')
    with pytest.raises(UserError, match=f'{name} exists: give another name, or --over'):
        classifier.quantize()
    assert existing.read_text() == 'old' and classifier.files == [name]
    classifier.quantize(overwrite=True)
    assert existing.read_bytes() != b'old' and len(classifier.files) == 3


def test_a_place_that_nobody_can_write_to_is_refused_first(classifier, monkeypatch):
    monkeypatch.setattr(quantizing, 'load_source', None)
    classifier.out = Path('/proc/net.onnx')
    with pytest.raises(UserError, match=r'^/proc/net.onnx cannot be written'):
        classifier.quantize()


@pytest.mark.parametrize('name', ['draw_layers', 'atomic_writes', '_latencies'])
def test_nothing_is_left_of_a_failure(classifier, monkeypatch, name):
    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(quantizing, name, fail)
    with pytest.raises(KeyboardInterrupt):
        classifier.quantize()
    assert classifier.files == []


@pytest.mark.parametrize('name', ['net.pth', 'net.json'])
def test_what_is_read_is_not_replaced(classifier, name):
    classifier.out = classifier.checkpoint.with_suffix('.onnx')
    options = dict(source_config=classifier.out.with_suffix('.json'))
    if name == 'net.pth':
        classifier.checkpoint = classifier.checkpoint.rename(classifier.out)
        options = {}
    with pytest.raises(UserError, match=r'would replace .*: give another name'):
        classifier.quantize(overwrite=True, **options)


def test_sliding_takes_crops(segmentor):
    """It is calibrated and evaluated with what the network gets."""
    segmentor.config.model.test_cfg = dict(mode='slide', crop_size=(16, 16), stride=(8, 8))
    done = segmentor.quantize(method='minmax', per_channel=True)
    (value,) = onnx.load(done.out).graph.input
    assert [d.dim_value for d in value.type.tensor_type.shape.dim] == [1, 3, 16, 16]
    assert done.samples == 4 and set(done.metrics['int8']) == {'aAcc', 'mIoU', 'mAcc'}


def test_old_operators_are_refused(classifier):
    with pytest.raises(UserError, match='int8 takes opset 13 or newer'):
        classifier.quantize(opset=12)


def test_a_model_without_a_data_preprocessor(classifier):
    classifier.config.data_preprocessor = None
    del classifier.config.model.data_preprocessor
    assert 'data_preprocessor' not in source._as_run(classifier.config).model


def test_images_of_another_size_are_one_sentence(classifier):
    with pytest.raises(UserError, match=r'takes inputs of shape .*give a fitting --shape'):
        classifier.quantize(shape=(3, 32, 32))
    assert classifier.files == []


def test_a_wrong_equalization_is_refused(classifier, monkeypatch):
    def spoil(graph):
        tensor = graph.graph.initializer[0]
        array = onnx.numpy_helper.to_array(tensor) * np.float32(1.001)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))

    monkeypatch.setattr(quantizing, 'equalize', spoil)
    with pytest.raises(UserError, match='leave --equalize out'):
        classifier.quantize(equalized=True)


def test_the_data_preprocessor_of_a_runner(classifier):
    """mmpretrain's configs have it beside the model."""
    options = dict(method='minmax', per_channel=True, overwrite=True)
    expected = classifier.quantize(**options)
    config = classifier.config
    config.data_preprocessor = config.model.pop('data_preprocessor')
    done = classifier.quantize(**options)
    assert done.metrics == expected.metrics
    # Random weights have the same metrics on raw images, and other outputs.
    assert done.outputs['output'] == pytest.approx(expected.outputs['output'], rel=1e-6)
    assert 'data_preprocessor' not in config.model


@pytest.mark.parametrize('make', [retinanet, faster_rcnn])
def test_detectors_by_their_raw_outputs(tmp_path, make):
    pytest.importorskip('mmdet')
    config = Config.fromfile(write_classification(tmp_path))
    config.default_scope, config.model = 'mmdet', make()
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='Resize', scale=(64, 64)),
        dict(type='PackDetInputs', meta_keys=()),
    ]
    data = dict(type='mmpretrain.CustomDataset', data_root=str(tmp_path / 'data'))
    config.train_dataloader.dataset = dict(data, data_prefix='train', pipeline=[])
    config.val_dataloader.dataset = dict(data, data_prefix='val', pipeline=pipeline)
    config.val_evaluator = None
    enter_scope(config)
    model = randomise(build_model(config)).eval()
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'net.pth')
    arguments = [config, tmp_path / 'net.pth', tmp_path / 'net.onnx']
    options = dict(samples=3, shape=(3, 64, 64))
    done = quantize_onnx(*arguments, **options)
    assert done.metric is None and done.metrics == {'fp32': {}, 'int8': {}}
    assert len(done.outputs) == (10 if make is retinanet else 4)
    assert all(sqnr > 8 for sqnr, _ in done.outputs.values())
    # One layer changes some of the outputs.
    assert all(8 < layer.sqnr < 200 for layer in done.layers)
    with pytest.raises(UserError, match='judged by its raw outputs'):
        quantize_onnx(*arguments, **options, metric='coco/bbox_mAP', overwrite=True)


def test_progress(classifier):
    titles = []

    def track(items, title):
        titles.append(title)
        return items

    classifier.quantize(track=track)
    assert titles == [
        'reading calibration images',
        'calibrating, minmax',
        'calibrating, percentile',
        'trying recipes',
        'ranking layers',
        'evaluating fp32',
        'evaluating int8',
    ]


def test_onnxruntime_is_needed(classifier, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'onnxruntime', None)
    with pytest.raises(UserError, match='exporting needs onnx, onnxruntime and onnxscript'):
        classifier.quantize()
