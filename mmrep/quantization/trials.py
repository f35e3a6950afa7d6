"""Find the fewest layers to leave in fp32 that keep the loss below a limit."""

from functools import partial
from typing import TYPE_CHECKING

from mmrep.errors import UserError

from .judging import Judgement, MetricJudge, OutputJudge
from .quantizer import Recipe
from .search import Search, fewest

if TYPE_CHECKING:
    # Imported where they are needed: mmrep works without them.
    from onnx import ModelProto


#: Tolerance of the largest loss: metrics are means in float32.
_ROUNDING = 1e-4


class Trials:
    """Quantized graphs with more and more layers left in fp32.

    Args:
        search: Has the quantizer, and the layers that stay in fp32 in any case.
        recipe: How layers are quantized.
        ranking: The other layers, the one that costs most first.
        judge: Measures how much a graph loses.
    """

    def __init__(
        self,
        search: Search,
        recipe: Recipe,
        ranking: list[str],
        judge: MetricJudge | OutputJudge,
    ) -> None:
        self._search, self._recipe = search, recipe
        self._ranking, self._judge = ranking, judge
        self._judgements: dict[int, Judgement] = {}

    @property
    def drops(self) -> dict[int, float]:
        """Loss of the metric by the number of layers left in fp32, as far as tried."""
        return {
            len(self._left(count)): judgement.drop
            for count, judgement in sorted(self._judgements.items())
        }

    def best(
        self, max_drop: float, allow_drop: bool
    ) -> tuple['ModelProto', list[str], Judgement]:
        """The graph with the fewest layers in fp32 that loses at most ``max_drop``.

        Returns:
            The graph, its layers in fp32, and what was measured of it.

        Raises:
            UserError: If every graph loses more and ``allow_drop`` is false. If it is true,
                the graph that loses least is returned.
        """
        count = 0
        if not self._loses_at_most(max_drop, 0):
            most = len(self._ranking) // 2
            count = fewest(most, partial(self._loses_at_most, max_drop))
        if count is None:
            count = min(self._judgements, key=lambda n: self._judgements[n].drop)
            if not allow_drop:
                raise UserError(self._complaint(max_drop))
        return self._quantized(count), self._left(count), self._judged(count)

    def _complaint(self, max_drop: float) -> str:
        drops, metric = self.drops, self._judge.metric
        first, best = min(drops), min(drops, key=drops.get)
        return (
            f'int8 ({self._recipe}) loses {drops[first]:.2f} of '
            f'{self._judge.reference[metric]:.2f} {metric}, and at best {drops[best]:.2f}, '
            f'with {best} layers left in fp32, which is more than --max-drop {max_drop:g}: '
            'nothing was written; try --equalize, more --samples, or --allow-drop'
        )

    def _left(self, count: int) -> list[str]:
        return [*self._search.keep, *self._ranking[:count]]

    def _quantized(self, count: int) -> 'ModelProto':
        return self._search.quantizer.quantize(self._recipe, self._left(count))

    def _loses_at_most(self, max_drop: float, count: int) -> bool:
        return self._judged(count).drop <= max_drop + _ROUNDING

    def _judged(self, count: int) -> Judgement:
        if count not in self._judgements:
            self._judgements[count] = self._judge(self._quantized(count))
        return self._judgements[count]
