"""Which recipe loses least, and which layers are better left in fp32."""

from collections.abc import Callable, Sequence

import numpy as np

from .progress import Track
from .quantizer import Quantizer, Recipe
from .sessions import Session, errors, total_sqnr

#: Of the images, how many outputs are compared: of a recipe, and of a layer alone.
COMPARED, _FOR_RANKING = 32, 16


class Search:
    """Compares quantized graphs with their fp32 graph on the calibration images.

    Args:
        quantizer: What quantizes.
        keep: Layers that stay in fp32 whatever they cost. Default: none.
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
        """The SQNR in dB where one layer alone is quantized, the worst first."""
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
    """The smallest number for which a condition holds, which holds for all above it.

    Where it does not, the number is one for which it holds, and for the one below it,
    which was asked for, it does not.

    Args:
        most: The largest number that is asked for.
        is_enough: The condition, which does not hold for 0.

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
