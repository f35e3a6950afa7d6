"""What each branch adds to the kernel of its block, and how large the weights are."""

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mmrep.models.blocks import ReparamBlock
from mmrep.reparam import NotFoldableError

#: Numbers of a block as a whole.
_NUMBERS = ('cancelled', 'largest', 'peak', 'channels')


@dataclass(frozen=True)
class BranchReport:
    """Statistics of the equivalent kernel of one block.

    Args:
        name: Name of the block.
        geometry: Channels in and out, size of the kernel and groups, as text.
        shares: Share of each branch, by name: ``|W_i| / sum_j |W_j|`` of the kernels that
            the branches fold to, in Frobenius norms.
        cancelled: ``1 - |sum_i W_i| / sum_i |W_i|``: 0 where the branches add up, 1 where
            they cancel.
        largest: ``max |W|`` of the equivalent kernel ``W``, which sets the scale of a
            per-tensor quantizer.
        peak: ``max |W|`` over the root mean square of ``W``: how much of the range of a
            per-tensor quantizer few weights take.
        channels: ``max |W|`` of the largest output channel over that of the median one.
        skeleton: The mean of ``|W|`` over the channels, for each tap ``(kh, kw)``.
    """

    name: str
    geometry: str
    shares: Mapping[str, float]
    cancelled: float
    largest: float
    peak: float
    channels: float
    skeleton: Tensor


@torch.no_grad()
def analyze_branches(model: nn.Module) -> list[BranchReport]:
    """Report on every block of a model in train form.

    Source of the skeletons: the average kernel magnitudes of `ACNet
    <https://arxiv.org/abs/1908.03930>`_ and of `Diverse Branch Block
    <https://arxiv.org/abs/2103.13425>`_.

    Args:
        model: The model; blocks whose kernel depends on the size of the input must have
            had a forward pass.

    Raises:
        NotFoldableError: If a block cannot be one conv; names it.
        ValueError: If the model has no block in train form.
    """
    reports = []
    for name, block in model.named_modules():
        if isinstance(block, ReparamBlock) and not block.deploy:
            try:
                reports.append(_report(name, block))
            except NotFoldableError as error:
                raise NotFoldableError(f'{name}.{error}') from None
    if not reports:
        raise ValueError('the model has no block in train form')
    return reports


def _report(name: str, block: ReparamBlock) -> BranchReport:
    kernels = block.branch_kernels(dtype=torch.float64)
    whole = torch.stack([*kernels.values()]).sum(0)
    norms = {branch: kernel.norm().item() for branch, kernel in kernels.items()}
    total = sum(norms.values())
    largest = whole.abs().flatten(1).amax(1)
    groups = '' if block.groups == 1 else f', {block.groups} groups'
    return BranchReport(
        name,
        f'{block.in_channels} -> {block.out_channels}, '
        f'{"x".join(map(str, block.kernel_size))}{groups}',
        {branch: _ratio(norm, total) for branch, norm in norms.items()},
        1 - _ratio(whole.norm().item(), total),
        largest.max().item(),
        _ratio(largest.max().item(), whole.square().mean().sqrt().item()),
        _ratio(largest.max().item(), largest.median().item()),
        whole.abs().mean((0, 1)),
    )


def _ratio(part: float, whole: float) -> float:
    """``part / whole``; 0 if ``whole`` is 0."""
    return part / whole if whole else 0.0


def write_table(reports: Iterable[BranchReport], path: str | Path) -> None:
    """Write reports as CSV: one row for each branch of each block."""
    with open(path, 'w', newline='', encoding='utf-8') as file:
        writer = csv.writer(file)
        writer.writerow(['block', 'geometry', 'branch', 'share', *_NUMBERS])
        for report in reports:
            numbers = [f'{getattr(report, name):.6g}' for name in _NUMBERS]
            for branch, share in report.shares.items():
                row = [report.name, report.geometry, branch, f'{share:.6g}']
                writer.writerow(row + numbers)
