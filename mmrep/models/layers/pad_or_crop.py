"""A layer that pads or crops, to align a branch with a tap of the block's conv."""

import torch.nn.functional as F
from torch import Tensor, nn

from mmrep.reparam import LinearConv, register_fold

Sides = tuple[int, int]


class PadOrCrop(nn.Module):
    """Pad the input where a number is positive, crop it where it is negative.

    Args:
        rows (tuple[int, int]): Pixels above and below.
        columns (tuple[int, int]): Pixels left and right.
        padding_mode (str): As ``nn.Conv2d``'s. Default: ``'zeros'``.
    """

    def __init__(self, rows: Sides, columns: Sides, padding_mode: str = 'zeros') -> None:
        super().__init__()
        self.rows = rows
        self.columns = columns
        self.padding_mode = padding_mode

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, C, H + sum(rows), W + sum(columns))``."""
        pad = (*self.columns, *self.rows)
        # Crop last: padding modes other than zeros read pixels that the crop removes.
        if any(pixels > 0 for pixels in pad):
            mode = 'constant' if self.padding_mode == 'zeros' else self.padding_mode
            x = F.pad(x, [max(pixels, 0) for pixels in pad], mode=mode)
        return F.pad(x, [min(pixels, 0) for pixels in pad])

    def extra_repr(self) -> str:
        return f'rows={self.rows}, columns={self.columns}, mode={self.padding_mode}'


@register_fold(PadOrCrop)
def _(layer: PadOrCrop, partial: LinearConv) -> LinearConv:
    return partial.then_pad(layer.rows, layer.columns, layer.padding_mode)
