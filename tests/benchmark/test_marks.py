"""The benchmarks start, and say what they measured."""

import importlib
from pathlib import Path

import pytest
import torch
from laws import assert_same
from mmengine.config import Config
from processes import run_python
from tiny_projects import classifier_model

from mmrep.deployment import build_model, deploy_config, enter_scope
from mmrep.hosts import forward
from mmrep.quantization import Session

MARKS = Path(__file__).parents[2] / 'benchmarks' / 'marks.py'


@pytest.mark.long
def test_a_group_is_measured_and_written(tmp_path):
    out = tmp_path / 'marks.json'
    options = ('--groups', 'memory', '--rounds', '1', '--out', out)
    ran = run_python(MARKS, *options, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert 'kept by a DBB' in ran.stdout and 'with_cp=True' in out.read_text()
    assert '| kept by a DBB: with_cp=True / input |' in out.with_suffix('.md').read_text()


def test_int8_graph_of_a_deploy_form(monkeypatch, tmp_path):
    """What is timed takes every batch, and is close to the model."""
    pytest.importorskip('mmpretrain')
    pytest.importorskip('onnxruntime')
    monkeypatch.syspath_prepend(MARKS.parent)
    marks = importlib.import_module('marks')
    config = Config(dict(default_scope='mmpretrain', model=classifier_model()))
    enter_scope(config)
    config = deploy_config(config)
    model = build_model(config)
    graphs = marks.fp32_and_int8(config, model)
    x = marks.images(3, 224)
    expected = forward(model, x)
    for graph, tolerance in zip(graphs.values(), (1e-5, 0.3), strict=True):
        (found,) = Session(graph)(x.numpy())
        assert_same(expected, torch.from_numpy(found), tolerance)
