"""Norms get the statistics of what they read, and stay the function that they were."""

import copy

import pytest
import torch
from laws import assert_differ, assert_same, image, randomise
from torch import nn

from mmrep.reparam import measure_norms


def test_measured_statistics():
    """Those of all that is read, over several batches; others keep theirs."""
    norm = randomise(nn.BatchNorm2d(5).double())
    unused = randomise(nn.BatchNorm2d(5).double())
    plain = nn.BatchNorm2d(5, affine=False).double()
    model = nn.ModuleList([norm, unused, plain]).train()
    unused.eval()
    batches = [3 + 2 * image(n, 5, 4, 3, seed=n) for n in (2, 3)]
    expected = [copy.deepcopy(norm).eval()(x) for x in batches]
    before = copy.deepcopy(unused.state_dict()), copy.deepcopy(plain.state_dict())
    count = measure_norms(model, lambda: [norm(x) for x in batches])
    assert count == 1
    values = torch.cat(batches).transpose(0, 1).flatten(1)
    assert_same(values.mean(1), norm.running_mean, 1e-12)
    assert_same(values.var(1), norm.running_var, 1e-12)
    assert norm.training and not unused.training and not norm._forward_pre_hooks
    norm.eval()
    for x, y in zip(batches, expected, strict=True):
        assert_same(y, norm(x), 1e-12)
    for old, now in zip(before, (unused, plain), strict=True):
        for key, value in now.state_dict().items():
            assert torch.equal(value, old[key])


def test_a_failed_run_changes_nothing():
    model = nn.Sequential(randomise(nn.BatchNorm2d(3)))
    before = copy.deepcopy(model.state_dict())

    def run():
        model(image(2, 3, 4, 4, dtype=torch.float32))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_norms(model, run)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.training and not model[0]._forward_pre_hooks
    assert_differ(model[0].running_var, torch.ones(3))
