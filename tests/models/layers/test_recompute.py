"""What is computed once more in the backward pass is what it was the first time."""

import copy

import pytest
import torch
from laws import (
    Tensors,
    assert_differ,
    assert_same,
    assert_same_step,
    image,
    randomise,
    step,
)
from torch import Tensor, nn

from mmrep.models.layers.recompute import run_block


class Unit(nn.Module):
    """A norm and what depends on its running statistics after their update."""

    def __init__(self, with_cp: bool) -> None:
        super().__init__()
        self.with_cp = with_cp
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return run_block(self, self.compute, x, self.with_cp)

    def compute(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return (x - self.norm.running_mean.reshape(1, -1, 1, 1)).square()


def pair() -> tuple[Unit, Unit]:
    """Without and with ``with_cp``, of the same weights."""
    plain = randomise(Unit(False).double())
    saving = Unit(True).double()
    saving.load_state_dict(plain.state_dict())
    return plain, saving


X, OTHER = image(2, 3, 4, 5), 3 + 2 * image(2, 3, 4, 5, seed=4)


def gradients(unit: Unit, change) -> Tensors:
    """Of a forward pass, a change and a backward pass."""
    x = X.clone().requires_grad_()
    loss = unit(x).sum()
    change(unit)
    loss.backward()
    return dict(x=x.grad, **{name: p.grad for name, p in unit.named_parameters()})


CHANGES = {
    'nothing': lambda unit: None,
    'another forward pass': lambda unit: unit(OTHER),
    'eval mode': lambda unit: unit.eval(),
}


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('change', CHANGES)
def test_as_it_was_the_first_time(change, training):
    plain, saving = (unit.train(training) for unit in pair())
    expected = gradients(plain, CHANGES[change])
    assert_same(expected, gradients(saving, CHANGES[change]))
    assert_same(plain.state_dict(), saving.state_dict())
    assert plain.norm.training is saving.norm.training
    assert saving.norm.momentum == 0.1


def test_train_mode_after_a_pass_in_eval_mode():
    plain, saving = (unit.eval() for unit in pair())
    expected = gradients(plain, lambda unit: unit.train())
    assert_same(expected, gradients(saving, lambda unit: unit.train()))
    assert saving.norm.training


def test_statistics_move_once_and_stay_the_same_tensors():
    plain, saving = pair()
    mean, before = saving.norm.running_mean, copy.deepcopy(saving.state_dict())
    for count in (1, 2):
        assert_same_step(step(plain, X), step(saving, X))
        assert saving.norm.num_batches_tracked == count
    assert saving.norm.running_mean is mean
    assert_differ(before['norm.running_mean'], mean)


@pytest.mark.parametrize('with_cp', [False, True])
def test_a_second_backward_pass(with_cp):
    unit = pair()[with_cp]
    loss = unit(X).sum()
    first = torch.autograd.grad(loss, list(unit.parameters()), retain_graph=True)
    assert_same(first, torch.autograd.grad(loss, list(unit.parameters())))
    with pytest.raises(RuntimeError, match='second time'):
        torch.autograd.grad(loss, list(unit.parameters()))
    assert unit.norm.num_batches_tracked == 1


def test_an_error_of_the_backward_pass_leaves_the_norms():
    """Also one that comes from what is computed again."""
    unit = pair()[1]
    loss = unit(X).sum()
    statistics = unit.norm.running_mean, unit.norm.running_var
    values = copy.deepcopy(unit.state_dict())
    unit.norm.weight.data = torch.ones(4, dtype=torch.float64)
    with pytest.raises(RuntimeError):
        loss.backward()
    unit.norm.weight.data = values['norm.weight']
    assert (unit.norm.running_mean, unit.norm.running_var) == statistics
    assert_same(values, unit.state_dict(), tolerance=0)
    assert unit.norm.momentum == 0.1
