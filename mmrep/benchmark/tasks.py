"""The tasks that a benchmark times."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from mmengine.config import Config
from torch import Tensor, nn

from mmrep.checkpoints import write_checkpoint
from mmrep.deployment import export_onnx
from mmrep.hosts import forward
from mmrep.reparam import flatten_outputs, has_running_statistics

#: A task with its model and input, to be called any number of times.
Run = Callable[[], object]


def step(model: nn.Module, x: Tensor, norm_eval: bool = False, amp: bool = False) -> Run:
    """Forward and backward passes in train mode, without an optimizer's step.

    Args:
        model: The model; left in train mode.
        x: Its input.
        norm_eval: Whether norms use their running statistics. Default: False.
        amp: Whether to compute in bfloat16 where autocast does. Default: False.
    """
    model.train()
    if norm_eval:
        for module in model.modules():
            if has_running_statistics(module):
                module.eval()

    def run() -> None:
        with _autocast(x, amp):
            outputs = flatten_outputs(forward(model, x)).values()
            loss = sum(output.float().square().mean() for output in outputs)
        loss.backward()
        model.zero_grad(set_to_none=True)

    return run


def compiled_step(model: nn.Module, x: Tensor, amp: bool = False) -> Run:
    """:func:`step` of the model compiled by ``torch.compile``."""
    # With channels last, torch 2.12 on a CPU writes beyond the weight gradient of small
    # strided 1x1 convs.
    options = {'layout_optimization': False} if x.device.type == 'cpu' else None
    return step(torch.compile(model, options=options), x, amp=amp)


def evaluation(model: nn.Module, x: Tensor, amp: bool = False) -> Run:
    """A forward pass in eval mode; for the arguments, see :func:`step`."""
    model.eval()

    def run() -> None:
        with torch.inference_mode(), _autocast(x, amp):
            forward(model, x)

    return run


def channels_last(model: nn.Module, x: Tensor, amp: bool = False) -> Run:
    """:func:`evaluation` with channels last in memory."""
    layout = torch.channels_last
    return evaluation(model.to(memory_format=layout), x.to(memory_format=layout), amp)


def compiled(model: nn.Module, x: Tensor, amp: bool = False) -> Run:
    """:func:`evaluation` of the model compiled by ``torch.compile``, weights frozen."""
    model.eval()

    def outputs(x: Tensor) -> list[Tensor]:
        return list(flatten_outputs(forward(model, x)).values())

    # Freezing lets the compiler lay out the weights for the convs once.
    program = torch.compile(outputs, options={'freezing': True})

    def run() -> None:
        with torch.no_grad(), _autocast(x, amp):
            program(x)

    return run


def onnxruntime(model: nn.Module, x: Tensor, deploy_config: Config) -> Run:
    """A forward pass in ONNX Runtime, on the CPU, with as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with TemporaryDirectory() as folder:
        checkpoint, graph = Path(folder, 'deploy.pth'), Path(folder, 'deploy.onnx')
        write_checkpoint(checkpoint, model.state_dict(), {})
        export_onnx(
            deploy_config, checkpoint, graph, shape=tuple(x.shape[1:]), dynamic=True
        )
        session = onnxruntime.InferenceSession(
            str(graph), options, providers=['CPUExecutionProvider']
        )
    pixels = x.numpy()
    return lambda: session.run(None, {'input': pixels})


def _autocast(x: Tensor, amp: bool) -> torch.autocast:
    return torch.autocast(x.device.type, torch.bfloat16, enabled=amp)
