import json
import math
from dataclasses import asdict

import pytest
import torch
from mmengine.config import Config
from tiny_projects import DBB_RESNET, REPVGG, classifier_model

from mmrep.benchmark import TASKS, Benchmark, benchmark, models_of
from mmrep.deployment import enter_scope
from mmrep.reparam import count_parameters

QUICK = dict(batch_size=2, shape=(3, 16, 16), rounds=1, compile_model=False)


def config_of(backbone: dict = REPVGG, in_channels: int = 16) -> Config:
    config = Config(
        dict(default_scope='mmpretrain', model=classifier_model(backbone, in_channels))
    )
    enter_scope(config)
    return config


def names(result: Benchmark, task: str) -> list[str]:
    return [timing.name for timing in result.timings if timing.task == task]


@pytest.fixture(scope='module')
def result() -> Benchmark:
    """Of a network that has a plain peer."""
    return benchmark(config_of(DBB_RESNET, 32), 'tiny', **QUICK)


def test_everything_is_measured(result):
    assert list(dict.fromkeys(timing.task for timing in result.timings)) == list(TASKS)
    for timing in result.timings:
        assert math.isfinite(timing.median) and timing.median > 0
        assert math.isfinite(timing.iqr) and timing.iqr >= 0
    pairs = [(timing.task, timing.name) for timing in result.timings]
    assert len(pairs) == len(set(pairs))
    for task in ('train', 'norm_eval'):
        assert names(result, task) == ['mmrep', 'plain']
    assert names(result, 'eval') == ['mmrep', 'plain', 'mmrep, deploy form']
    assert names(result, 'deploy')[:3] == ['mmrep', 'plain', 'mmrep, channels_last']
    assert 'mmrep, torch.compile' not in names(result, 'deploy')


def test_memory_of_what_is_computed_alike(result):
    peaks = {(t.task, t.name): t.peak for t in result.timings}
    for (task, _), peak in peaks.items():
        assert peak is None if task == 'deploy' else peak > 0
    # Branches take memory for their gradients.
    assert peaks['train', 'mmrep'] > peaks['train', 'plain']
    assert peaks['eval', 'mmrep'] < peaks['train', 'mmrep']


def test_what_was_measured(result):
    assert result.config == 'tiny'
    assert result.device == f'CPU, {torch.get_num_threads()} threads'
    assert result.dtype == 'float32'
    assert result.shape == (2, 3, 16, 16)
    assert json.loads(json.dumps(asdict(result)))['timings'][0]['task'] == 'train'


def test_sizes(result):
    model, plain = models_of(config_of(DBB_RESNET, 32))
    expected = {
        'mmrep, train form': model.train_form,
        'mmrep, deploy form': model.deploy_form,
        'plain, train form': plain.train_form,
    }
    assert result.sizes.keys() == expected.keys()
    for name, model in expected.items():
        assert result.sizes[name]['parameters'] == count_parameters(model)
        assert result.sizes[name]['flops'] > 0
    trains, deployed = (result.sizes[f'mmrep, {form} form'] for form in ('train', 'deploy'))
    assert trains['flops'] > deployed['flops']


@pytest.mark.parametrize('task', TASKS)
def test_one_task(task):
    result = benchmark(config_of(), 'tiny', tasks=(task,), **QUICK)
    assert {timing.task for timing in result.timings} == {task}


def test_amp():
    result = benchmark(config_of(), 'tiny', amp=True, tasks=('eval', 'deploy'), **QUICK)
    assert result.dtype == 'bfloat16'
    # ONNX Runtime has no autocast.
    assert names(result, 'deploy') == ['mmrep', 'mmrep, channels_last']


def test_compiled_steps(monkeypatch):
    compiled = []
    monkeypatch.setattr(
        torch, 'compile', lambda model, **options: compiled.append(model) or model
    )
    options = dict(QUICK, tasks=('train', 'norm_eval'), compile_model=True)
    result = benchmark(config_of(DBB_RESNET, 32), 'tiny', **options)
    expected = ['mmrep', 'plain', 'mmrep, torch.compile', 'plain, torch.compile']
    assert names(result, 'train') == expected
    assert names(result, 'norm_eval') == ['mmrep', 'plain']
    sizes = [result.sizes[f'{name}, train form']['parameters'] for name in expected[:2]]
    assert list(map(count_parameters, compiled)) == sizes


def test_every_config_is_compiled(monkeypatch):
    """Also where the compiler has given up on the one before."""
    graphs, real = [], torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(
        torch, 'compile', lambda model, **options: real(model, backend=backend)
    )
    options = dict(QUICK, tasks=('deploy',), compile_model=True)
    with torch._dynamo.config.patch(cache_size_limit=1):
        for _ in range(2):
            graphs.clear()
            benchmark(config_of(), 'tiny', **options)
            assert graphs


def test_shape_of_the_config():
    config = config_of()
    config.merge_from_dict(dict(test_pipeline=[dict(type='CenterCrop', crop_size=20)]))
    result = benchmark(config, 'tiny', tasks=('eval',), **dict(QUICK, shape=None))
    assert result.shape[:2] == (2, 3)
    assert min(result.shape[2:]) >= 20
