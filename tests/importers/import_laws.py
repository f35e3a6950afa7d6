"""What holds for every imported checkpoint, as assertions."""

from pathlib import Path
from typing import Any

import torch
from laws import assert_same
from torch import Tensor, nn

from mmrep.importers import Imported, import_checkpoint
from mmrep.registry import MODELS
from mmrep.reparam import branch_by_branch


def without(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights under a prefix, without it."""
    return {
        key.removeprefix(prefix): value
        for key, value in state.items()
        if key.startswith(prefix)
    }


def backbone_of(path: Path) -> nn.Module:
    """The backbone of an imported checkpoint, built from the file alone."""
    checkpoint = torch.load(path, weights_only=True)
    backbone = MODELS.build(checkpoint['meta']['backbone'])
    backbone.load_state_dict(without('backbone.', checkpoint['state_dict']), strict=True)
    return backbone.eval()


@torch.no_grad()
def features_of(path: Path, x: Tensor) -> tuple[Tensor, ...]:
    """The outputs of the backbone of an imported checkpoint."""
    backbone = backbone_of(path)
    with branch_by_branch(backbone):
        return backbone(x)


@torch.no_grad()
def logits_of(path: Path, x: Tensor) -> Tensor:
    """What an imported checkpoint says of images: mean over the map, linear layer."""
    state = torch.load(path, weights_only=True)['state_dict']
    last = features_of(path, x)[-1]
    # Some are means themselves.
    mean = last.mean((2, 3)) if last.dim() == 4 else last
    return nn.functional.linear(mean, state['head.fc.weight'], state['head.fc.bias'])


def import_weights(weights: Any, folder: Path, **options) -> Imported:
    """Save and import what ``torch.save`` takes."""
    source = folder / 'source.pth'
    torch.save(weights, source)
    return import_checkpoint(source, folder / 'imported.pth', overwrite=True, **options)


def assert_imports(
    model: nn.Module, weights: Any, x: Tensor, folder: Path, layout: str
) -> Imported:
    """An imported checkpoint computes what its source computes.

    Args:
        model: The source model, from images to logits, in eval mode.
        weights: The checkpoint, with the weights of this model in it.
        x: Images.
        folder: Where to write.
        layout: What the layout must be found to be.
    """
    done = import_weights(weights, folder)
    assert done.layout == layout
    with torch.no_grad():
        assert_same(model(x), logits_of(done.out, x))
    return done
