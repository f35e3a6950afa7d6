"""bfloat16 autocast on the CPU, of classifiers with a backbone of mmrep.

How far autocast may be from float32 depends on the network, which amplifies rounding: it is
measured by a float32 computation in which every result is rounded to bfloat16. Autocast
rounds as often, but not by the same amounts: up to twice this error is allowed.
"""

import copy
import functools
import math
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import pytest
import torch
from host_models import CLASSES, classifier
from laws import always_one_conv, image, randomise
from mmengine.optim import OptimWrapper
from mmpretrain.structures import DataSample
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmrep.reparam import branch_by_branch, switch_to_deploy

#: In training, deep networks of random weights amplify rounding until nothing is left.
SHALLOW = ['RepVGG', 'RepVGG-D2se', 'RepVGG of DBBs']
BATCH = 8
X = image(BATCH, 3, 64, 64, dtype=torch.float32)

autocast = functools.partial(torch.autocast, 'cpu', torch.bfloat16)


def rounded(value: object) -> object:
    """A float32 tensor with its numbers rounded to bfloat16; other values unchanged."""
    is_float = isinstance(value, Tensor) and value.dtype == torch.float32
    return value.bfloat16().float() if is_float else value


class Rounding(TorchFunctionMode):
    """Float32, with every result, and the inputs of convs and linear layers, rounded."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, '__name__', '') in ('conv2d', 'linear'):
            args = [rounded(value) for value in args]
        return rounded(func(*args, **(kwargs or {})))


def error(reference: Tensor, output: Tensor) -> float:
    """The relative L2 error."""
    return ((output.float() - reference).norm() / reference.norm()).item()


class Step(NamedTuple):
    """A training step: logits and loss before it, and its gradient."""

    logits: Tensor
    loss: Tensor
    gradient: Tensor


def training_step(model: nn.Module, precision: AbstractContextManager) -> Step:
    """One training step of a copy of a model."""
    model = copy.deepcopy(model).train()
    samples = [DataSample().set_gt_label(index % CLASSES) for index in range(BATCH)]
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.01))
    with precision:
        logits = copy.deepcopy(model)(X, mode='tensor')
        loss, _ = model.parse_losses(model(X, samples, mode='loss'))
    before = nn.utils.parameters_to_vector(model.parameters())
    wrapper.backward(loss)
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    wrapper.step()
    assert not torch.equal(before, nn.utils.parameters_to_vector(model.parameters()))
    return Step(logits.detach(), loss.detach(), gradient)


@pytest.mark.parametrize('name', SHALLOW)
def test_training_step(name):
    model = randomise(classifier(name))
    exact = training_step(model, nullcontext())
    expected = training_step(model, Rounding())
    low = training_step(model, autocast())
    assert low.logits.dtype == torch.bfloat16
    assert low.gradient.dtype == torch.float32
    assert low.gradient.isfinite().all()
    allowed = 2 * error(exact.logits, expected.logits)
    assert 0 < error(exact.logits, low.logits) <= allowed
    # The gradient of cross entropy with respect to the logits has a norm of at most
    # sqrt(2), and the loss is the mean over the batch.
    steepest = math.sqrt(2 / BATCH) * exact.logits.norm()
    assert abs(low.loss - exact.loss) <= steepest * allowed
    allowed = 2 * error(exact.gradient, expected.gradient)
    assert 0 < error(exact.gradient, low.gradient) <= allowed < 1


@pytest.mark.parametrize('name', [*SHALLOW, 'DBBResNet-18', 'DBBMobileNetV1'])
@torch.no_grad()
def test_both_forms_in_eval_mode(name):
    model = randomise(classifier(name)).eval()
    deployed = copy.deepcopy(model)
    switch_to_deploy(deployed)

    def logits(form: nn.Module, precision: AbstractContextManager) -> Tensor:
        with precision:
            return form(X, mode='tensor')

    with branch_by_branch(model):
        exact = logits(model, nullcontext())
        allowed = 2 * error(exact, logits(model, Rounding()))
        branches = logits(model, autocast())
    allowed_fused = 2 * error(exact, logits(deployed, Rounding()))
    fused = logits(deployed, autocast())
    with always_one_conv(model):
        one_conv = logits(model, autocast())
    assert {y.dtype for y in (branches, one_conv, fused)} == {torch.bfloat16}
    assert 0 < error(exact, branches) <= allowed
    # The train form's convs outside of blocks still have their norms.
    assert 0 < error(exact, one_conv) <= max(allowed, allowed_fused)
    assert 0 < error(exact, fused) <= allowed_fused
    # Two independent errors.
    assert error(branches.float(), fused) <= math.hypot(allowed, allowed_fused)
