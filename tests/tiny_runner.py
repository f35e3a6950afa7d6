"""A run of mmengine alone: a tiny model, random data, no host package."""

import itertools
from pathlib import Path
from typing import Any

import torch
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import Tensor, nn

from mmrep.models.blocks import RepVGGBlock

_names = itertools.count()


class TinyModel(BaseModel):
    """One block and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.block = RepVGGBlock(3, 4)
        self.fc = nn.Linear(4, 2)

    def forward(
        self, inputs: Tensor, labels: Tensor | None = None, mode: str = 'tensor'
    ) -> Any:
        logits = self.fc(self.block(inputs).mean((2, 3)))
        if mode == 'loss':
            return dict(loss=nn.functional.cross_entropy(logits, labels))
        return list(logits) if mode == 'predict' else logits


class MeanLogits(BaseMetric):
    """The mean logits, which differ whenever the weights differ."""

    def process(self, data_batch: Any, data_samples: list[Tensor]) -> None:
        self.results += data_samples

    def compute_metrics(self, results: list[Tensor]) -> dict:
        return {'logits': torch.stack(results).mean(0).tolist()}


def _loader() -> dict:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(4, 3, 6, 6, generator=generator)
    return dict(
        batch_size=2,
        num_workers=0,
        dataset=[
            dict(inputs=image, labels=index % 2) for index, image in enumerate(images)
        ],
        sampler=dict(type='DefaultSampler', shuffle=False),
        collate_fn=dict(type='default_collate'),
    )


def tiny_runner(work_dir: Path, **options: Any) -> Runner:
    """A runner that trains for one epoch of two iterations, and tests.

    Args:
        work_dir: Where checkpoints and logs go.
        options: Arguments of the ``Runner`` to add or to replace.
    """
    return Runner(
        **{
            **dict(
                model=TinyModel(),
                work_dir=str(work_dir),
                train_dataloader=_loader(),
                train_cfg=dict(by_epoch=True, max_epochs=1),
                optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.5, momentum=0.9)),
                test_dataloader=_loader(),
                test_cfg=dict(),
                test_evaluator=MeanLogits(),
                default_scope='mmengine',
                # mmengine keeps the state of experiments by their names.
                experiment_name=f'tiny-{next(_names)}',
            ),
            **options,
        }
    )
