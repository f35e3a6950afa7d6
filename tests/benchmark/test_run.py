import json
import math
from dataclasses import asdict

import pytest
import torch
from mmengine.config import Config
from tiny_projects import DBB_RESNET, REPVGG, classifier_model

from mmrep.benchmark import WORKS, Benchmark, benchmark, subjects_of
from mmrep.deployment import enter_scope
from mmrep.reparam import count_parameters

QUICK = dict(batch_size=2, shape=(3, 16, 16), rounds=1, compile_model=False)


def config_of(backbone: dict = REPVGG, in_channels: int = 16) -> Config:
    config = Config(
        dict(default_scope='mmpretrain', model=classifier_model(backbone, in_channels))
    )
    enter_scope(config)
    return config


def names(done: Benchmark, work: str) -> list[str]:
    return [timing.name for timing in done.timings if timing.work == work]


@pytest.fixture(scope='module')
def done() -> Benchmark:
    """Of a network that has a plain peer."""
    return benchmark(config_of(DBB_RESNET, 32), 'tiny', **QUICK)


def test_everything_is_measured(done):
    assert list(dict.fromkeys(timing.work for timing in done.timings)) == list(WORKS)
    for timing in done.timings:
        assert math.isfinite(timing.median) and timing.median > 0
        assert math.isfinite(timing.iqr) and timing.iqr >= 0
    pairs = [(timing.work, timing.name) for timing in done.timings]
    assert len(pairs) == len(set(pairs))
    for work in ('train', 'norm_eval'):
        assert names(done, work) == ['mmrep', 'plain']
    assert names(done, 'eval') == ['mmrep', 'plain', 'mmrep, deploy form']
    assert names(done, 'deploy')[:3] == ['mmrep', 'plain', 'mmrep, channels_last']
    assert 'mmrep, torch.compile' not in names(done, 'deploy')


def test_memory_of_what_is_computed_alike(done):
    peaks = {(t.work, t.name): t.peak for t in done.timings}
    for (work, _), peak in peaks.items():
        assert peak is None if work == 'deploy' else peak > 0
    # Branches take memory for their gradients.
    assert peaks['train', 'mmrep'] > peaks['train', 'plain']
    assert peaks['eval', 'mmrep'] < peaks['train', 'mmrep']


def test_what_was_measured(done):
    assert done.config == 'tiny'
    assert done.device == f'CPU, {torch.get_num_threads()} threads'
    assert done.dtype == 'float32'
    assert done.shape == (2, 3, 16, 16)
    assert json.loads(json.dumps(asdict(done)))['timings'][0]['work'] == 'train'


def test_sizes(done):
    subject, plain = subjects_of(config_of(DBB_RESNET, 32))
    expected = {
        'mmrep, train form': subject.train_form,
        'mmrep, deploy form': subject.deploy_form,
        'plain, train form': plain.train_form,
    }
    assert done.sizes.keys() == expected.keys()
    for name, model in expected.items():
        assert done.sizes[name]['parameters'] == count_parameters(model)
        assert done.sizes[name]['flops'] > 0
    trains, deployed = (done.sizes[f'mmrep, {form} form'] for form in ('train', 'deploy'))
    assert trains['flops'] > deployed['flops']


@pytest.mark.parametrize('work', WORKS)
def test_one_work(work):
    done = benchmark(config_of(), 'tiny', works=(work,), **QUICK)
    assert {timing.work for timing in done.timings} == {work}


def test_amp():
    done = benchmark(config_of(), 'tiny', amp=True, works=('eval', 'deploy'), **QUICK)
    assert done.dtype == 'bfloat16'
    # ONNX Runtime has no autocast.
    assert names(done, 'deploy') == ['mmrep', 'mmrep, channels_last']


def test_compiled_steps(monkeypatch):
    compiled = []
    monkeypatch.setattr(
        torch, 'compile', lambda model, **options: compiled.append(model) or model
    )
    options = dict(QUICK, works=('train', 'norm_eval'), compile_model=True)
    done = benchmark(config_of(DBB_RESNET, 32), 'tiny', **options)
    expected = ['mmrep', 'plain', 'mmrep, torch.compile', 'plain, torch.compile']
    assert names(done, 'train') == expected
    assert names(done, 'norm_eval') == ['mmrep', 'plain']
    sizes = [done.sizes[f'{name}, train form']['parameters'] for name in expected[:2]]
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
    options = dict(QUICK, works=('deploy',), compile_model=True)
    with torch._dynamo.config.patch(cache_size_limit=1):
        for _ in range(2):
            graphs.clear()
            benchmark(config_of(), 'tiny', **options)
            assert graphs


def test_shape_of_the_config():
    config = config_of()
    config.merge_from_dict(dict(test_pipeline=[dict(type='CenterCrop', crop_size=20)]))
    done = benchmark(config, 'tiny', works=('eval',), **dict(QUICK, shape=None))
    assert done.shape[:2] == (2, 3)
    assert min(done.shape[2:]) >= 20
