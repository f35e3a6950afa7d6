"""Observe which norm reads a conv's output in a forward pass of any model."""

import gc
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.weak import TensorWeakRef

from .fold import has_running_statistics
from .geometry import is_watched

#: Modules that return their input in train mode, too.
_PASS = (nn.Identity, nn.Sequential)


@dataclass(frozen=True)
class ConvNormPairs:
    """What :func:`conv_norm_pairs` found.

    Args:
        norms: The name of the norm after a conv, by the conv's name.
        unpaired: Why a conv is in no pair, by the conv's name.
        entangled: The unpaired convs that are used in other ways than being called on one
            tensor and returning one: not called, returning no tensor, with hooks or a
            parametrization, or with a parameter that something else reads or shares.
            Default: none.
    """

    norms: Mapping[str, str]
    unpaired: Mapping[str, str]
    entangled: frozenset[str] = frozenset()


def conv_norm_pairs(
    model: nn.Module,
    run: Callable[[nn.Module], Any],
    kind: type[nn.Module] = nn.Conv2d,
) -> ConvNormPairs:
    """Find the norm that reads the output of each conv, in one forward pass.

    A conv and a norm are a pair if each output of the conv is read once, by that norm; if
    no output of the conv is kept after the pass, as the model's outputs are; and if the
    norm reads nothing else. Then the model uses the two only as ``norm(conv(x))``. Dropout
    functions and modules that return their input count as reading it, because they may
    change it in train mode.

    Args:
        model: Any model. Its modes, hooks and buffers are left as they were, and so is the
            random state of torch and Python.
        run: Calls the model, as ``lambda model: model(x)`` does. The model is in eval mode,
            and gradients are off. A small input is enough, on the meta device if the model
            supports it.
        kind: The type that counts as a conv, together with all modules inside it; for
            example, a block. Default: ``nn.Conv2d`` and its subclasses.

    Returns:
        The pairs of convs with norms that have running statistics, by the names of
        ``model.named_modules()``, and why the other convs are in no pair.
    """
    with eval_pass(model), _Watch(model, kind) as watch:
        outputs = torch.compiler.disable(run)(model)
    kept = watch.kept()
    del outputs
    return watch.judge(kept)


@contextmanager
def eval_pass(model: nn.Module) -> Iterator[None]:
    """Run in eval mode without gradients, and restore what a forward pass changes.

    These are the modes and buffers of the model, and the random state of torch and Python.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    devices = {p.get_device() for p in model.parameters() if p.is_cuda}
    state = random.getstate()
    with torch.random.fork_rng(devices), torch.no_grad():
        try:
            model.eval()
            yield
        finally:
            random.setstate(state)
            for module, training in modes:
                # Not train(), which a model may override to freeze layers.
                module.training = training
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer.copy_(value)


@dataclass
class _Output:
    """An output of a conv or a norm, and the names of what read it."""

    conv: str
    tensor: TensorWeakRef
    readers: list[str] = field(default_factory=list)


@dataclass
class _Call:
    """A call of a conv or a norm that has not returned yet."""

    name: str
    inputs: list[Tensor]


class _Watch(ExitStack):
    """Records what reads the outputs of a model's convs while the context is open."""

    def __init__(self, model: nn.Module, kind: type[nn.Module]) -> None:
        super().__init__()
        self.model = model
        self.kind = kind
        self.convs: dict[str, nn.Module] = {}
        self.norms: dict[str, nn.Module] = {}
        self.outputs: list[_Output] = []
        self.by_id: dict[int, _Output] = {}
        #: Per module name, the modules whose outputs it reads; '' for any other tensor.
        self.sources: dict[str, set[str]] = {}
        self.owners: dict[int, str] = {}
        #: Why a conv or norm can be in no pair, whatever reads its output.
        self.barred: dict[str, str] = {}
        self.calls: list[_Call] = []

    def __enter__(self) -> '_Watch':
        inside: set[nn.Module] = set()
        for name, module in self.model.named_modules():
            if module in inside:
                continue
            if isinstance(module, self.kind):
                inside.update(module.modules())
                self._register(name, module, self.convs)
            elif has_running_statistics(module):
                self._register(name, module, self.norms)
            elif not isinstance(module, _PASS):
                self._hook(module.register_forward_hook, self._passed, name)
        self.enter_context(_Dropouts(self))
        self.enter_context(_Operators(self))
        return self

    def _register(self, name: str, module: nn.Module, kind: dict[str, nn.Module]) -> None:
        kind[name] = module
        if is_watched(module):
            self.barred[name] = f'{name} has hooks or a parametrization'
        for parameter in module.parameters():
            owner = self.owners.setdefault(id(parameter), name)
            if owner != name:
                self.barred[owner] = self.barred[name] = (
                    f'{owner} and {name} share a parameter'
                )
        self._hook(module.register_forward_pre_hook, self._begin, name)
        self._hook(module.register_forward_hook, self._end, name)

    def _hook(self, register: Callable, see: Callable, name: str) -> None:
        def hook(module: nn.Module, args: tuple, kwargs: dict, *output: Any) -> None:
            see(name, _tensors((args, kwargs)), *output)

        self.callback(register(hook, with_kwargs=True).remove)

    def _begin(self, name: str, inputs: list[Tensor]) -> None:
        self.calls.append(_Call(name, inputs))
        found = [output for tensor in inputs if (output := self._find(tensor))]
        for output in found:
            output.readers.append(name)
        sources = {output.conv for output in found}
        self.sources.setdefault(name, set()).update(
            sources if len(found) == len(inputs) == 1 else {''}
        )

    def _end(self, name: str, inputs: list[Tensor], output: Any) -> None:
        self.calls.pop()
        if not isinstance(output, Tensor):
            self.barred[name] = f'it returns {type(output).__name__}, which is not a tensor'
            return
        made = _Output(name, TensorWeakRef(output))
        self.outputs.append(made)
        self.by_id[id(output)] = made

    def _passed(self, name: str, inputs: list[Tensor], output: Any) -> None:
        """Record a module that returns its input: in train mode it may change it."""
        for tensor in inputs:
            if tensor is output and (made := self._find(tensor)):
                made.readers.append(name)

    def _find(self, tensor: Tensor) -> _Output | None:
        made = self.by_id.get(id(tensor))
        return made if made is not None and made.tensor() is tensor else None

    def read(self, tensors: list[Tensor], reader: str) -> None:
        """Record that an operator reads tensors."""
        call = self.calls[-1] if self.calls else _Call('', [])
        for tensor in tensors:
            if any(tensor is given for given in call.inputs):
                # Recorded when the module was called.
                continue
            if made := self._find(tensor):
                made.readers.append(reader)
            if id(tensor) not in self.owners:
                continue
            if (owner := self.owners[id(tensor)]) != call.name:
                reason = f'a parameter of {owner} is read by {reader}'
                self.barred.setdefault(owner, reason)

    def kept(self) -> set[str]:
        """The convs with an output that still exists."""
        # Frees the outputs that only reference cycles keep.
        gc.collect()
        return {output.conv for output in self.outputs if output.tensor() is not None}

    def judge(self, kept: set[str]) -> ConvNormPairs:
        """The pairs found; ``kept`` are the convs with an output that still exists."""
        pairs, unpaired = {}, {}
        for conv in self.convs:
            readers = [output.readers for output in self.outputs if output.conv == conv]
            norm = readers[0][0] if readers and readers[0] else ''
            if reason := self._reason(conv, norm, readers, kept):
                unpaired[conv] = reason
            else:
                pairs[conv] = norm
        called = {output.conv for output in self.outputs}
        return ConvNormPairs(
            pairs,
            unpaired,
            frozenset(c for c in unpaired if c in self.barred or c not in called),
        )

    def _reason(
        self, conv: str, norm: str, readers: list[list[str]], kept: set[str]
    ) -> str | None:
        names = sorted({name for each in readers for name in each})
        if conv in self.barred:
            return self.barred[conv]
        if not readers:
            return 'it is not called'
        if conv in kept:
            return 'its output is kept after the pass, as outputs of the model are'
        if not norm:
            return 'nothing reads its output'
        if any(len(each) != 1 for each in readers):
            return f'its output is read more than once, by {" and ".join(names)}'
        if len(names) > 1:
            return f'its outputs are read by {" and ".join(names)}'
        if norm not in self.norms:
            return f'no norm with running statistics reads its output, only {norm}'
        if self.sources[norm] != {conv}:
            return f'{norm} reads other tensors as well'
        return self.barred.get(norm)


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_flatten(values)[0] if isinstance(value, Tensor)]


class _Dropouts(TorchFunctionMode):
    """Records dropout functions, which return their input in eval mode only."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(
        self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        name = getattr(func, '__name__', '')
        if 'dropout' in name:
            self.watch.read(_tensors(output), name)
        return output


class _Operators(TorchDispatchMode):
    """Records every operator, also in scripted code."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(
        self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        self.watch.read(_tensors((args, kwargs)), func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))
