"""Compare recipes by what the metric loses."""

from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config

from mmrep.errors import UserError

from .progress import Track, untracked
from .quantizer import Quantizer, Recipe
from .source import load_source


def int8_metrics(
    config: Config,
    checkpoint: str | Path,
    recipes: Sequence[Recipe],
    samples: int = 128,
    track: Track = untracked,
) -> tuple[float, dict[Recipe, float]]:
    """The metric of a checkpoint in fp32, and by each recipe in int8.

    Everything that can be is quantized; see :func:`quantize_onnx` for how and with what.

    Args:
        config: The config.
        checkpoint: The checkpoint.
        recipes: What is compared.
        samples: The most calibration images. Default: 128.
        track: Wraps what takes long, with a title. Default: nothing.

    Raises:
        UserError: With one sentence, if anything is wrong.
    """
    source = load_source(config, checkpoint, None, samples, track)
    if source.evaluation is None:
        raise UserError('no classifier and no segmentor: there is no metric to compare')
    quantizer = Quantizer(source.graph, source.images)
    judge = source.judge(track)
    found = {r: judge(quantizer.quantize(r)).metrics[judge.metric] for r in recipes}
    return judge.reference[judge.metric], found
