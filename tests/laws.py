"""Assertions that hold for every module with a deploy form."""

import copy
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile

from mmrep.reparam import branch_by_branch, reparam_blocks, switch_to_deploy

#: Largest relative L2 error by dtype.
TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 6e-2,
}

Tensors = dict[str, Tensor]


def tensors_in(values: Any, name: str = 'output') -> Tensors:
    """The tensors in nested mappings and sequences, by name."""
    if isinstance(values, Tensor):
        return {name: values.detach()}
    items = values.items() if isinstance(values, Mapping) else enumerate(values)
    return {
        key: tensor
        for index, value in items
        for key, tensor in tensors_in(value, f'{name}.{index}').items()
    }


def assert_same(reference: Any, output: Any, tolerance: float | None = None) -> float:
    """Compare nested tensors one by one by their relative L2 error.

    The error is relative to the tensor's own norm, or, where that is small, to a
    thousandth of the norm of all of them: a gradient that is zero in theory consists of
    rounding errors in practice.

    Args:
        reference: Tensors, of which at least one is not zero.
        output: The tensors to compare with it, by the same names.
        tolerance: The largest error. Default: that of the outputs' dtype.

    Returns:
        The largest error.
    """
    expected, actual = tensors_in(reference), tensors_in(output)
    assert expected.keys() == actual.keys()
    overall = math.hypot(*(t.double().norm().item() for t in expected.values()))
    assert math.isfinite(overall) and overall > 0, 'nothing to compare with'
    largest = 0.0
    for name, tensor in expected.items():
        other = actual[name]
        assert tensor.shape == other.shape, name
        assert other.isfinite().all(), name
        allowed = TOLERANCE.get(other.dtype, 0) if tolerance is None else tolerance
        norm = max(tensor.double().norm().item(), 1e-3 * overall)
        error = (other.double() - tensor.to(other.device).double()).norm().item() / norm
        assert error <= allowed, f'{name}: relative error {error:.2e}'
        largest = max(largest, error)
    return largest


def assert_differ(first: Tensor, second: Tensor) -> None:
    """Check that two tensors of the same shape are far from each other."""
    assert (first - second).norm() > 1e-3 * first.norm()


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Set every parameter and every running statistic to random values, in place."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: Tensor) -> Tensor:
        return torch.rand(tensor.shape, generator=generator, dtype=torch.float64)

    for name, tensor in module.named_parameters():
        if tensor.dim() > 1:
            width = (3 / tensor[0].numel()) ** 0.5
            tensor.copy_((2 * draw(tensor) - 1) * width)
        elif name.endswith('weight'):
            tensor.copy_(0.5 + draw(tensor))
        else:
            tensor.copy_(draw(tensor) - 0.5)
    for name, tensor in module.named_buffers():
        if name.endswith('running_var'):
            tensor.copy_(0.4 + draw(tensor))
        elif name.endswith('running_mean'):
            tensor.copy_(draw(tensor) - 0.5)
    return module


def image(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    """A random input."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def on_meta(network: type, *args, **kwargs) -> nn.Module:
    """Build a network on the meta device, without memory for its parameters."""
    with torch.device('meta'):
        return network(*args, **kwargs)


def frozen(model: nn.Module) -> set[str]:
    """The names of the children whose parameters and running statistics are frozen."""
    names = set()
    for name, child in model.named_children():
        grads = {p.requires_grad for p in child.parameters()}
        modes = {m.training for m in child.modules()}
        if not grads:
            continue
        # A child is frozen as a whole or not at all.
        assert len(grads) == len(modes) == 1 and grads == modes
        if grads == {False}:
            names.add(name)
    return names


def running_statistics(module: nn.Module) -> Tensors:
    """Copies of the running means and variances."""
    return {
        name: tensor.clone()
        for name, tensor in module.named_buffers()
        if 'running_' in name
    }


def step(module: nn.Module, x: Tensor) -> dict[str, Tensors]:
    """Outputs, gradients and running statistics of one forward and backward pass."""
    module.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    outputs = tensors_in(out := module(x))
    flat = [out] if isinstance(out, Tensor) else list(out)
    # A plain sum of outputs has no gradient through a norm: weight every pixel.
    sum((y * image(*y.shape, seed=2).to(y)).sum() for y in flat).backward()
    gradients = {
        name: parameter.grad
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }
    return {
        'outputs': outputs,
        'gradients': {'input': x.grad, **gradients},
        'statistics': running_statistics(module),
    }


def assert_same_step(reference: dict[str, Tensors], output: dict[str, Tensors]) -> None:
    """Compare the results of two calls of :func:`step`."""
    for part, tensors in reference.items():
        if tensors or output[part]:
            assert_same(tensors, output[part])


def kept_maps(function: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """How many maps of the size of ``x`` a forward pass keeps besides its output.

    Measured by torch's allocator: what was allocated and not freed, whatever holds it.
    """
    with (
        warnings.catch_warnings(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        # The profiler warns that it keeps one cycle only.
        warnings.simplefilter('ignore')
        output = function(x)
    events = profiler.profiler.kineto_results.events()
    held = sum(event.nbytes() for event in events if event.name() == '[memory]')
    return (held - output.nbytes) / x.nbytes


class Calls(TorchFunctionMode):
    """Counts the functions of torch that are called, by name: ``calls['conv2d']``."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.counts[getattr(func, '__name__', '')] += 1
        return func(*args, **(kwargs or {}))

    def __getitem__(self, name: str) -> int:
        return self.counts[name]


def count_convs(module: nn.Module, x: Tensor) -> int:
    """How many convs and poolings a forward pass computes."""
    with Calls() as calls:
        module(x)
    return calls['conv2d'] + calls['avg_pool2d']


@contextmanager
def always_one_conv(model: nn.Module) -> Iterator[nn.Module]:
    """Let blocks compute as one conv where they can, even where it is slower."""
    blocks = [block for block in model.modules() if hasattr(block, 'one_conv')]
    before = [block.one_conv for block in blocks]
    for block in blocks:
        block.one_conv = block.one_conv is not False
    try:
        yield model
    finally:
        for block, value in zip(blocks, before, strict=True):
            block.one_conv = value


def assert_deploy_equivalent(module: nn.Module, x: Tensor) -> nn.Module:
    """Check that ``module`` and its deploy form are the same function in eval mode.

    First sets all parameters and running statistics to random values, so that each of them
    counts. Also checks that the train form computes the same by its equivalent kernels.

    Returns:
        The deploy form, a copy.
    """
    randomise(module).eval()
    with torch.no_grad(), branch_by_branch(module):
        reference = module(x)
    with torch.no_grad(), always_one_conv(module):
        assert_same(reference, module(x))
    deployed = copy.deepcopy(module)
    report = switch_to_deploy(deployed)
    assert report.switched
    with torch.no_grad():
        assert_same(reference, deployed(x))
    for block in reparam_blocks(deployed).values():
        assert not block.branches()
        assert not any(hasattr(m, 'running_mean') for m in block.modules())
    assert not deployed.training
    return deployed


def assert_built_form_is_fused_one(build: Callable[..., nn.Module], x: Tensor) -> nn.Module:
    """Check that the fused form and the one built with ``deploy=True`` are the same.

    Returns:
        The fused form.
    """
    deployed = assert_deploy_equivalent(build().double(), x)
    built = build(deploy=True).double().eval()
    built.load_state_dict(deployed.state_dict())
    other = image(1, *x.shape[1:], seed=4)
    assert_same(deployed(other), built(other))
    return deployed


def assert_one_conv_exact(module: nn.Module, x: Tensor) -> None:
    """Check that equivalent kernels give the outputs and gradients of the branches."""
    randomise(module).eval()
    with branch_by_branch(module):
        reference = step(module, x)
        by_branches = count_convs(module, x)
    with always_one_conv(module):
        assert_same_step(reference, step(module, x))
        assert count_convs(module, x) < by_branches
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert trained <= reference['gradients'].keys()
