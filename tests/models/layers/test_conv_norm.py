import copy

import pytest
import torch
import torch.nn.functional as F
from laws import assert_same, assert_same_step, image, randomise, step
from torch import nn

from mmrep.models.layers import conv_norm


class Unit(nn.Module):
    """A conv and its norm, by ``conv_norm`` or one after the other."""

    def __init__(self, at_once: bool = True, bias: bool = False, affine: bool = True):
        super().__init__()
        self.at_once = at_once
        self.conv = nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2, bias=bias)
        self.norm = nn.BatchNorm2d(8, affine=affine, eps=0.01)

    def forward(self, x):
        if self.at_once:
            return conv_norm(self.conv, self.norm, x)
        return self.norm(self.conv(x))


def calls(unit: Unit, x: torch.Tensor, monkeypatch) -> int:
    """How often the norm itself computes."""
    count = []
    with monkeypatch.context() as patch:
        batch_norm = F.batch_norm
        patch.setattr(F, 'batch_norm', lambda *args: count.append(1) or batch_norm(*args))
        unit(x)
    return len(count)


LARGE, SMALL = (4, 6, 200, 200), (1, 6, 8, 8)


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('affine', [False, True])
@pytest.mark.parametrize('shape', [LARGE, SMALL])
def test_is_the_norm_of_the_conv(bias, affine, shape):
    unit = randomise(Unit(bias=bias, affine=affine).double()).eval()
    plain = copy.deepcopy(unit)
    plain.at_once = False
    x = image(*shape)
    assert_same(plain(x), unit(x))
    assert_same_step(step(plain, x), step(unit, x))


def test_folds_where_it_pays(monkeypatch):
    unit = Unit().double().eval()
    assert calls(unit, image(*LARGE), monkeypatch) == 0
    assert calls(unit, image(*SMALL), monkeypatch) == 1


def test_sees_every_change():
    unit, x = randomise(Unit().double()).eval(), image(*LARGE)
    for tensor in (unit.conv.weight.data, unit.norm.weight.data, unit.norm.running_var):
        tensor.mul_(1.5)
        assert_same(unit.norm(unit.conv(x)), unit(x))


@pytest.mark.parametrize('part', ['conv', 'norm'])
def test_hooks_are_called(part):
    unit, seen = Unit().double().eval(), []
    getattr(unit, part).register_forward_hook(lambda *_: seen.append(part))
    unit(image(*LARGE))
    assert seen == [part]


def test_batch_statistics_are_not_folded(monkeypatch):
    unit = Unit().double().train()
    assert calls(unit, image(*LARGE), monkeypatch) == 1


def test_other_convs_compute_themselves(monkeypatch):
    class Doubled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    unit, x = Unit().double().eval(), image(*LARGE)
    unit.conv = Doubled(6, 8, 3).double()
    assert_same(unit.norm(unit.conv(x)), unit(x))
    assert calls(unit, x, monkeypatch) == 1


def test_norms_with_a_forward_of_their_own_compute_themselves():
    class Doubled(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    unit = Unit().double()
    unit.norm = Doubled(8).double()
    randomise(unit).eval()
    x = image(*LARGE)
    assert_same(unit.norm(unit.conv(x)), unit(x))
