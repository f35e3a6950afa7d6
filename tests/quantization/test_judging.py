"""What int8 costs, by a metric and by raw outputs."""

import math

import numpy as np
import pytest
import torch

pytest.importorskip('onnxruntime')

from onnx_graphs import Graph, images

from mmrep.errors import UserError
from mmrep.quantization import HostEvaluation, Quantizer, Recipe, Session
from mmrep.quantization.judging import MetricJudge, OutputJudge
from mmrep.quantization.progress import untracked


class Evaluation(HostEvaluation):
    """Two batches of images, and metrics that are given."""

    def __init__(self, *values: float, rule: str | None = None) -> None:
        self.values, self.titles = list(values), []
        self._metric, self._named, self._rule = None, 'score', rule

    def measure(self, infer, form='', track=None):
        """The next metric."""
        self.titles.append(form)
        self.outputs = [infer(torch.from_numpy(x)) for x in images(2, seed=3)]
        return {'score': self.values.pop(0), 'other': 1.0}


def graphs():
    graph = Graph()
    out = graph.conv('input', 6, 4)
    fp32 = graph.model(out)
    return fp32, Quantizer(fp32, images(4)).quantize(Recipe('minmax', True))


def test_metric_and_outputs():
    fp32, int8 = graphs()
    evaluation = Evaluation(80.0, 77.5)
    judge = MetricJudge(evaluation, fp32, untracked)
    assert judge.metric == 'score' and judge.reference == {'score': 80.0, 'other': 1.0}
    expected = [Session(fp32)(x)[0] for x in images(2, seed=3)]
    for found, output in zip(evaluation.outputs, expected, strict=True):
        np.testing.assert_array_equal(found.numpy(), output)
    judged = judge(int8)
    assert judged.drop == 2.5 and judged.metrics == {'score': 77.5, 'other': 1.0}
    assert evaluation.titles == ['fp32', 'int8']
    # The metric is that of what int8 computes, and the outputs are compared with fp32's.
    (error,) = judged.outputs.values()
    found = [Session(int8)(x)[0] for x in images(2, seed=3)]
    noise = sum(((a - b) ** 2).sum() for a, b in zip(found, expected, strict=True))
    signal = sum((b**2).sum() for b in expected)
    assert error.sqnr == pytest.approx(10 * math.log10(signal / noise), rel=1e-3)
    np.testing.assert_array_equal(evaluation.outputs[1].numpy(), found[1])


def test_less_may_be_better():
    fp32, int8 = graphs()
    judge = MetricJudge(Evaluation(2.0, 2.25, rule='less'), fp32, untracked)
    assert judge(int8).drop == 0.25
    other = Evaluation(2.0, 2.25, rule='less')
    other._metric, other._named = 'score', 'other'
    assert MetricJudge(other, fp32, untracked)(int8).drop == -0.25


def test_what_is_no_number_is_lost():
    fp32, int8 = graphs()
    judge = MetricJudge(Evaluation(80.0, math.nan), fp32, untracked)
    assert judge(int8).drop == math.inf
    with pytest.raises(UserError, match='score of the fp32 model is not a number'):
        MetricJudge(Evaluation(math.nan), fp32, untracked)


def test_outputs_alone():
    fp32, int8 = graphs()
    judged = OutputJudge(images(3), fp32)(int8)
    assert judged.drop == 0 and judged.metrics == {}
    (error,) = judged.outputs.values()
    assert 25 < error.sqnr < 60 and 0.9 < error.agreement <= 1
    assert OutputJudge(images(3), fp32)(fp32).outputs['conv_0'].sqnr == math.inf
