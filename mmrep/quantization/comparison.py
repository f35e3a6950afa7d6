"""Compare quantization recipes by what they lose."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mmengine.config import Config

from mmrep.errors import UserError

from .progress import Track, untracked
from .quantizer import Quantizer, Recipe
from .sessions import total_sqnr
from .source import load_source


class Int8(NamedTuple):
    """What was measured of a recipe.

    Args:
        metric: The metric in int8.
        sqnr: SQNR in dB of the raw outputs on the validation set.
    """

    metric: float
    sqnr: float


def compare_recipes(
    config: Config,
    checkpoint: str | Path,
    recipes: Sequence[Recipe],
    samples: int = 128,
    metric: str | None = None,
    track: Track = untracked,
) -> tuple[float, dict[Recipe, Int8]]:
    """Measure the metric of a checkpoint in fp32, and in int8 with each recipe.

    All layers that can be quantized are; for calibration and evaluation, see
    :func:`quantize_onnx`.

    Args:
        config: The config.
        checkpoint: The checkpoint.
        recipes: The recipes to compare.
        samples: The largest number of calibration images. Default: 128.
        metric: See :class:`HostEvaluation`. Default: None.
        track: Wraps what takes long, with a title, to show progress. Default: nothing.

    Returns:
        The metric in fp32, and the measurements of each recipe.

    Raises:
        UserError: With one sentence, if anything is wrong.
    """
    source = load_source(config, checkpoint, metric, samples, track)
    if source.evaluation is None:
        raise UserError(
            'the model is neither a classifier nor a segmentor: there is no metric to '
            'compare by; give a config of one'
        )
    quantizer = Quantizer(source.graph, source.images)
    judge = source.judge(track)
    found = {}
    for recipe in recipes:
        judged = judge(quantizer.quantize(recipe))
        sqnr = total_sqnr([*judged.outputs.values()])
        found[recipe] = Int8(judged.metrics[judge.metric], sqnr)
    return judge.reference[judge.metric], found
