"""Raw outputs are evaluated as the host evaluates its model."""

import pytest
import torch
from laws import randomise
from mmengine.config import Config
from mmengine.runner import Runner
from tiny_projects import classifier_model, write_classification, write_segmentation

from mmrep.deployment import build_model, enter_scope
from mmrep.errors import ConfigError, UserError
from mmrep.hosts import forward
from mmrep.quantization import HostEvaluation
from mmrep.quantization.evaluation import has_one_head


def project(write, tmp_path) -> Config:
    pytest.importorskip('mmpretrain' if write is write_classification else 'mmseg')
    if write is write_segmentation:
        pytest.importorskip('mmcv.ops')
    config = Config.fromfile(write(tmp_path))
    enter_scope(config)
    return config


@pytest.mark.parametrize('write', [write_classification, write_segmentation])
@pytest.mark.parametrize('seed', range(3))
def test_same_metrics_as_the_runner(tmp_path, write, seed, capfd):
    """Outputs of the model itself, given from outside, have the Runner's metrics."""
    config = project(write, tmp_path)
    torch.manual_seed(seed)
    model = randomise(build_model(config)).eval()
    other = randomise(build_model(config)).eval()
    capfd.readouterr()
    measured = HostEvaluation(config, other).measure(lambda x: forward(model, x))
    assert capfd.readouterr().out == ''
    config.work_dir, config.log_level = str(tmp_path / 'work'), 'ERROR'
    runner = Runner.from_cfg(config)
    runner.model.load_state_dict(model.state_dict())
    expected = runner.val_loop.run()
    assert measured == pytest.approx({k: float(v) for k, v in expected.items()})
    # The model predicts by itself as before.
    data = next(iter(runner.val_dataloader))
    (one, *_), (two, *_) = other.val_step(data), other.val_step(data)
    key = 'pred_score' if write is write_classification else 'seg_logits'
    torch.testing.assert_close(one.get(key).data, two.get(key).data)
    assert 'extract_feat' not in vars(other)


def test_slide_inference_and_a_list_of_metrics(tmp_path):
    config = project(write_segmentation, tmp_path)
    config.model.test_cfg = dict(mode='slide', crop_size=(16, 16), stride=(8, 8))
    config.val_evaluator = dict(metrics=[config.val_evaluator])
    model = randomise(build_model(config)).eval()
    shapes = []

    def infer(x):
        shapes.append(tuple(x.shape[2:]))
        return forward(model, x)

    evaluation = HostEvaluation(config, build_model(config))
    metrics = evaluation.measure(infer)
    assert set(shapes) == {(16, 16)} and set(metrics) == {'aAcc', 'mIoU', 'mAcc'}
    assert evaluation.metric_of(metrics) == 'mIoU'


@pytest.mark.parametrize('write', [write_classification, write_segmentation])
def test_inputs_of_a_batch_are_single(tmp_path, write):
    config = project(write, tmp_path)
    config.val_dataloader.batch_size = 3
    model = randomise(build_model(config)).eval()
    evaluation = HostEvaluation(config, build_model(config))
    data = next(iter(evaluation.loader))
    images = evaluation.inputs_of(data, lambda x: forward(model, x))
    expected = model.data_preprocessor(data)['inputs']
    assert len(expected) == 3
    torch.testing.assert_close([torch.from_numpy(x) for x in images], [*expected.split(1)])


@pytest.fixture
def evaluation(tmp_path):
    config = project(write_classification, tmp_path)

    def make(metric=None, save_best=None):
        config.default_hooks.checkpoint.save_best = save_best
        return HostEvaluation(config, build_model(config), metric)

    return make


@pytest.mark.parametrize(
    ('given', 'save_best', 'metric', 'expected'),
    [
        ('accuracy/top1 accuracy/top5', None, None, 'accuracy/top1'),
        ('accuracy/top1 accuracy/top5', 'accuracy/top5', None, 'accuracy/top5'),
        ('accuracy/top1 accuracy/top5', 'accuracy/top1', 'accuracy/top5', 'accuracy/top5'),
        ('aAcc mIoU', 'auto', None, 'mIoU'),
        ('own', None, None, 'own'),
    ],
)
def test_which_metric(evaluation, given, save_best, metric, expected):
    metrics = dict.fromkeys(given.split(), 1.0)
    assert evaluation(metric, save_best).metric_of(metrics) == expected


@pytest.mark.parametrize(
    ('metric', 'save_best', 'rule', 'less'),
    [
        ('accuracy/top1', None, None, False),
        ('mIoU', 'mIoU', 'greater', False),
        ('own', 'own', 'less', True),
        ('own', 'auto', 'less', True),
        ('own', 'other', 'less', False),
        ('rmse', None, None, True),
        ('rmse', 'rmse', 'greater', False),
        ('depth/abs_rel', None, None, True),
        ('val_loss', None, None, True),
        ('coco/bbox_mAP', None, None, False),
        ('mosaic', None, None, False),
    ],
)
def test_what_is_better(evaluation, metric, save_best, rule, less):
    made = evaluation(save_best=save_best)
    made._rule = rule
    assert made.less_is_better(metric) == less


def test_no_such_metric_is_one_sentence(evaluation):
    with pytest.raises(UserError, match='gives no mIoU: choose --metric from a, b'):
        evaluation('mIoU').metric_of(dict(a=1.0, b=2.0))
    with pytest.raises(UserError, match='the evaluator gives a, b: choose one by --metric'):
        evaluation().metric_of(dict(a=1.0, b=2.0))
    with pytest.raises(UserError, match='gives none that is a number'):
        evaluation().metric_of({})


@pytest.mark.parametrize('name', ['val_dataloader', 'val_evaluator'])
def test_a_config_without(tmp_path, name):
    config = project(write_classification, tmp_path)
    model = build_model(config)
    config[name] = None
    with pytest.raises(ConfigError, match=f'this config has no {name}'):
        HostEvaluation(config, model)


def test_which_models_have_one_head(tmp_path):
    config = project(write_classification, tmp_path)
    shape = (1, 3, 24, 16)
    model = build_model(config)
    assert has_one_head(model, shape) and 'forward' not in vars(model.head)
    # One that returns something else than its head does.
    original = model.forward
    model.forward = lambda *args, **kwargs: 2 * original(*args, **kwargs)
    assert not has_one_head(model, shape)
    config.model.head = None
    assert not has_one_head(build_model(config), shape)
    assert not has_one_head(torch.nn.Linear(1, 1), shape)
    # A cascade has several decode heads.
    model = torch.nn.Module()
    model.extract_feat, model.decode_head = None, torch.nn.ModuleList()
    assert not has_one_head(model, shape)


@pytest.mark.parametrize('kind', ['DAHead', 'EncHead', 'GCHead'])
def test_heads_of_several_outputs(tmp_path, kind):
    """Their predictions cannot be made of one of these."""
    config = project(write_segmentation, tmp_path)
    head = dict(config.model.decode_head, type=kind)
    for name in ('num_convs',) if kind == 'GCHead' else ('num_convs', 'concat_input'):
        del head[name]
    head |= dict(DAHead=dict(pam_channels=4), EncHead=dict(num_codes=4), GCHead={})[kind]
    if kind == 'EncHead':
        del head['in_index']
        head |= dict(
            in_channels=[16, 16], in_index=(0, 0), loss_se_decode=head['loss_decode']
        )
    config.model.decode_head = head
    model = build_model(config)
    assert has_one_head(model, (1, 3, 24, 16)) == (kind == 'GCHead')


def test_the_head_of_auxiliary_classifiers(tmp_path):
    """Its predictions are made of the main head's outputs."""
    config = project(write_classification, tmp_path)
    backbone = dict(classifier_model()['backbone'], out_indices=(0, 1, 2, 3))
    head = dict(config.model.head)
    own = [dict(head, in_channels=channels) for channels in (8, 8, 16)]
    config.model.head = dict(type='mmrep.AuxiliaryClsHead', head=head, auxiliary_heads=own)
    config.model.backbone, config.model.neck = backbone, None
    model = randomise(build_model(config)).eval()
    evaluation = HostEvaluation(config, build_model(config))
    scores = []

    def infer(x):
        scores.append(forward(model, x))
        return scores[-1]

    assert evaluation.measure(infer).keys() == {'accuracy/top1'}
    samples = model.val_step(next(iter(evaluation.loader)))
    found = torch.stack([sample.pred_score for sample in samples])
    torch.testing.assert_close(found, scores[0].softmax(1))
