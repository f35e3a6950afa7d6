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
    batches = [3 + 0.2 * image(n, 5, 4, 3, seed=n) for n in (2, 3)]
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


def test_sums_are_exact_enough():
    """In float32 the squares of these would hide their variance, or make it negative."""
    norm = nn.BatchNorm2d(2)
    x = 1e4 + image(4, 2, 8, 8, dtype=torch.float32)
    x[:, 1] = 1234.567
    measure_norms(norm, lambda: norm(x))
    assert_same(x[:, 0].double().var(), norm.running_var[0].double(), 1e-3)
    assert 0 <= norm.running_var[1] < 1e-4


def test_half_precision():
    """A variance near eps is not rounded before the two are added."""
    norm = nn.BatchNorm2d(64).eval()
    nn.init.uniform_(norm.running_var, 1e-6, 1e-5)
    x = image(2, 64, 3, 3, dtype=torch.float32)
    norm, x = norm.bfloat16(), x.bfloat16()
    before = (norm.running_var.double() + norm.eps).sqrt()
    measure_norms(norm, lambda: norm(x))
    values = x.double().transpose(0, 1).flatten(1)
    expected = (values.var(1) + norm.eps).sqrt() / before
    assert torch.equal(norm.weight, expected.bfloat16())


@pytest.mark.parametrize('pixels', [1, 2, 3])
def test_few_values(pixels):
    """The variance of one is 0, and not infinite."""
    norm = nn.BatchNorm2d(2).double()
    x = image(1, 2, 1, pixels)
    measure_norms(norm, lambda: norm(x))
    variance = x[0, :, 0].var(1) if pixels > 1 else torch.zeros(2).double()
    assert_same(variance + 1, norm.running_var + 1, 1e-12)


def test_norms_anywhere_in_a_model():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))).double()
    # Without running statistics there is nothing to measure, and without an affine map
    # nothing that would keep the function.
    model.append(nn.BatchNorm2d(4, track_running_stats=False).double())
    model.append(nn.BatchNorm2d(4, affine=False).double())
    x = image(4, 3, 5, 5)
    assert measure_norms(model, lambda: model(x)) == 1
    assert_same(model[0][0](x).mean((0, 2, 3)), model[0][1].running_mean, 1e-12)


@pytest.mark.parametrize('step', range(20))
def test_no_variance_is_negative(step):
    """Sums of one large number over several batches are rounded."""
    norm, constant = nn.BatchNorm2d(1).double(), 1e6 / 3 + step / 7

    def run():
        for rows in range(1, 8):
            norm(torch.full((1, 1, rows, 35), constant).double())

    measure_norms(norm, run)
    assert 0 <= norm.running_var < 1e-3


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
