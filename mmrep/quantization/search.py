"""Find the recipe that loses least, and the layers that cost most in int8."""

from collections.abc import Callable, Sequence

import numpy as np

from .progress import Track
from .quantizer import Quantizer, Recipe
from .sessions import Session, errors, total_sqnr

#: The number of images to compare outputs on: for a recipe, and for a layer alone.
COMPARED, _FOR_RANKING = 32, 16


class Search:
    """Compares quantized graphs with their fp32 graph on the calibration images.

    Args:
        quantizer: The quantizer of the fp32 graph.
        keep: Layers that stay in fp32 in any case. Default: none.
    """

    def __init__(self, quantizer: Quantizer, keep: Sequence[str] = ()) -> None:
        self.quantizer = quantizer
        self.keep = list(keep)
        fp32 = Session(quantizer.model)
        self._references = [fp32(image) for image in quantizer.images[:COMPARED]]

    def recipes(self, recipes: Sequence[Recipe], track: Track) -> dict[Recipe, float]:
        """The SQNR of each recipe in dB, the best first."""
        found = {}
        for recipe in track(recipes, 'trying recipes'):
            quantized = Session(self.quantizer.quantize(recipe, self.keep))
            found[recipe] = self._sqnr(quantized, COMPARED)
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def layers(self, recipe: Recipe, track: Track) -> dict[str, float]:
        """The SQNR in dB with each layer quantized alone, the worst first."""
        found = {}
        names = [name for name in self.quantizer.layers if name not in self.keep]
        for name in track(names, 'ranking layers'):
            quantized = Session(self.quantizer.quantize(recipe, only=name))
            found[name] = self._sqnr(quantized, _FOR_RANKING)
        return dict(sorted(found.items(), key=lambda item: item[1]))

    def _sqnr(self, session: Session, count: int) -> float:
        images: Sequence[np.ndarray] = self.quantizer.images
        return total_sqnr(errors(self._references[:count], session, images[:count]))


def fewest(most: int, is_enough: Callable[[int], bool]) -> int | None:
    """Find the smallest number for which a condition holds, by bisection.

    The condition is taken to hold for all larger numbers, too. If it does not, the result
    is a number for which it holds while it does not hold for the number below.

    Args:
        most: The largest number to try.
        is_enough: The condition, which is taken not to hold for 0.

    Returns:
        The number, or None if the condition does not hold for ``most``.
    """
    low, high = 0, min(1, most)
    while high > low and not is_enough(high):
        low, high = high, min(2 * high, most)
    if high == low:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high
