"""Quantize a config's checkpoint to an int8 ONNX file, and measure its accuracy."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from mmengine.config import Config

from mmrep.benchmark import interleave
from mmrep.checkpoints import (
    atomic_writes,
    out_path,
    plain,
    refuse_existing,
    refuse_unwritable,
)
from mmrep.deployment import VerificationError
from mmrep.errors import UserError

from .equalization import equalize
from .picture import draw_layers
from .progress import Track, untracked
from .quantizer import METHODS, Quantizer, Recipe
from .search import Search
from .sessions import Session, errors, total_sqnr
from .source import load_source
from .trials import Trials

if TYPE_CHECKING:
    # Imported where they are needed: mmrep works without them.
    from onnx import ModelProto

AUTO = 'auto'

#: The first opset that has a scale for each channel of a weight.
_OPSET = 13

#: The least SQNR of an equalized graph, in dB; 120 dB are a relative L2 error of 1e-6.
_EQUALIZED_SQNR = 120.0


@dataclass(frozen=True)
class Layer:
    """A layer of the graph.

    Args:
        name: The name of its node.
        form: ``'int8'`` or ``'fp32'``.
        ranges: Smallest, median and largest ``max |w|`` of its output channels.
        sqnr: SQNR of the graph's outputs in dB where this layer alone is quantized; None
            for one that was excluded.
    """

    name: str
    form: str
    ranges: tuple[float, float, float]
    sqnr: float | None


@dataclass(frozen=True)
class QuantizedOnnx:
    """What :func:`quantize_onnx` did.

    Args:
        out: The file.
        picture: The picture of the layers.
        record: The record of all these results, as JSON.
        recipe: How it was quantized.
        recipes: SQNR of each recipe that was tried, on the calibration images, in dB.
        samples: Number of calibration images.
        equalized: Number of convs whose channels were equalized; None if not asked for.
        metric: Name of the metric that decides; None if raw outputs decide.
        metrics: All metrics, by form; empty if raw outputs decide.
        outputs: SQNR in dB and argmax agreement of each raw output, on the validation
            set, or on the calibration images if raw outputs decide.
        drops: Loss of the metric by the number of layers left in fp32, as far as tried.
        sizes: Bytes of each form's graph.
        latencies: Median seconds of each form for one image.
        layers: The layers, in order.
    """

    out: Path
    picture: Path
    record: Path
    recipe: Recipe
    recipes: dict[Recipe, float]
    samples: int
    equalized: int | None
    metric: str | None
    metrics: dict[str, dict[str, float]]
    outputs: dict[str, tuple[float, float]]
    drops: dict[int, float]
    sizes: dict[str, int]
    latencies: dict[str, float]
    layers: list[Layer]

    @property
    def left(self) -> list[str]:
        """The layers that are left in fp32."""
        return [layer.name for layer in self.layers if layer.form == 'fp32']


def quantize_onnx(
    config: Config,
    checkpoint: str | Path,
    out: str | Path,
    *,
    max_drop: float = 0.5,
    allow_drop: bool = False,
    samples: int = 128,
    method: str = AUTO,
    per_channel: bool | None = None,
    exclude: Sequence[str] = (),
    equalized: bool = False,
    reduce_range: bool = False,
    metric: str | None = None,
    overwrite: bool = False,
    source_config: str | Path = '',
    track: Track = untracked,
    **export: Any,
) -> QuantizedOnnx:
    """Write a checkpoint as an int8 ONNX file, and measure what that costs.

    The deploy form is exported in fp32 as by :func:`~mmrep.deployment.export_onnx`. It is
    calibrated on images of the training set, which go through the test pipeline, and
    quantized by ONNX Runtime: QDQ, weights int8, activations uint8. The recipe is taken
    whose raw outputs have the largest SQNR on the calibration images. Then the host
    evaluates both forms on the validation set. If the metric loses more than ``max_drop``,
    layers are left in fp32, those first that cost most on the calibration images when they
    alone are quantized: as few as bring the loss below ``max_drop``, and at most half of
    the layers.

    A model that is neither a classifier nor a segmentor, as a detector, is judged by its
    raw outputs on the calibration images; then ``max_drop`` has no effect.

    Args:
        config: The config that the checkpoint was trained with, or its deploy config.
        checkpoint: The checkpoint, in train, deploy or host form.
        out: The file, ``.onnx``. Beside it, a record ``.json`` and a picture ``.png``.
        max_drop: The largest loss of the metric, in its own unit. Default: 0.5.
        allow_drop: Whether to write a file that loses more. Default: False.
        samples: The largest number of calibration images. Default: 128.
        method: ``'minmax'``, ``'percentile'`` or ``'auto'``, the better. Default:
            ``'auto'``.
        per_channel: Whether each output channel of a weight has its own scale. Default:
            None, the better.
        exclude: Patterns of layers that stay in fp32, as ``'*conv_seg*'``. Default: none.
        equalized: Whether to :func:`~mmrep.quantization.equalize` first. Default: False.
        reduce_range: Whether weights get 7 bits, for CPUs without VNNI. Default: False.
        metric: The metric that may lose ``max_drop``. Default: see
            :class:`~mmrep.quantization.HostEvaluation`.
        overwrite: Whether to replace existing files. Default: False.
        source_config: Name of the config, for the record. Default: ''.
        track: Wraps what takes long, with a title, to show progress. Default: nothing.
        **export: ``dynamic``, ``opset``, ``shape`` and ``rtol`` of
            :func:`~mmrep.deployment.export_onnx`.

    Raises:
        UserError: With one sentence, if anything is wrong, or the loss is larger and not
            allowed; then nothing is written.
    """
    out = out_path(out, '.onnx')
    picture, record = out.with_suffix('.png'), out.with_suffix('.json')
    refuse_existing(out, picture, record, overwrite=overwrite)
    for path in (out, picture, record):
        for read in (checkpoint, source_config):
            if Path(expanduser(read)).resolve() == path.resolve():
                raise UserError(f'{path} would replace {read}: give another name')
        # They are written at the end, minutes later.
        refuse_unwritable(path)
    if (export.get('opset') or _OPSET) < _OPSET:
        raise UserError(f'int8 takes opset {_OPSET} or newer: give another --opset')
    export['source_config'] = source_config
    source = load_source(config, checkpoint, metric, samples, track, **export)
    graph, images = source.graph, source.images
    convs = _equalize(graph, images) if equalized else None
    quantizer = Quantizer(graph, images, reduce_range, track)
    search = Search(quantizer, quantizer.matching(exclude))
    recipes = _recipes(method, per_channel)
    for each in dict.fromkeys(recipe.method for recipe in recipes):
        quantizer.calibrate(each)
    recipes = search.recipes(recipes, track)
    recipe = next(iter(recipes))
    alone = search.layers(recipe, track)
    judge = source.judge(track)
    trials = Trials(search, recipe, list(alone), judge)
    int8, left, judgement = trials.best(max_drop, allow_drop)
    result = QuantizedOnnx(
        out=out,
        picture=picture,
        record=record,
        recipe=recipe,
        recipes=recipes,
        samples=len(images),
        equalized=convs,
        metric=judge.metric,
        metrics={'fp32': judge.reference, 'int8': judgement.metrics},
        outputs={n: (e.sqnr, e.agreement) for n, e in judgement.outputs.items()},
        drops=trials.drops,
        sizes={'fp32': graph.ByteSize(), 'int8': int8.ByteSize()},
        latencies=_latencies({'fp32': graph, 'int8': int8}, images[0]),
        layers=_layers(quantizer, left, alone),
    )
    options = dict(
        max_drop=max_drop,
        allow_drop=allow_drop,
        exclude=list(exclude),
        reduce_range=reduce_range,
    )
    _write(result, int8, {**source.said, 'options': options})
    return result


def _recipes(method: str, per_channel: bool | None) -> list[Recipe]:
    """The recipes to try; of equally good ones the first is taken."""
    methods = METHODS if method == AUTO else (method,)
    granularities = (True, False) if per_channel is None else (per_channel,)
    return [Recipe(*pair) for pair in product(methods, granularities)]


def _equalize(graph: 'ModelProto', images: Sequence[np.ndarray]) -> int:
    """Equalize a graph in place, and verify that it computes the same."""
    before = Session(graph)
    count = equalize(graph)
    seen = images[:1]
    sqnr = total_sqnr(errors([before(image) for image in seen], Session(graph), seen))
    if not sqnr >= _EQUALIZED_SQNR:
        raise VerificationError(
            f'the equalized graph has an SQNR of {sqnr:.0f} dB, so it differs by more than '
            'rounding: nothing was written; leave --equalize out, or report the config'
        )
    return count


def _layers(
    quantizer: Quantizer, left: Sequence[str], alone: dict[str, float]
) -> list[Layer]:
    """The :class:`Layer` of each layer of the graph."""
    layers = []
    for name in quantizer.layers:
        ranges = quantizer.channel_ranges(name)
        spread = float(ranges.min()), float(np.median(ranges)), float(ranges.max())
        form = 'fp32' if name in left else 'int8'
        layers.append(Layer(name, form, spread, alone.get(name)))
    return layers


def _latencies(graphs: dict[str, 'ModelProto'], image: np.ndarray) -> dict[str, float]:
    """Median seconds for one image, in turns."""
    sessions = {form: Session(graph) for form, graph in graphs.items()}
    runs = {form: partial(session, image) for form, session in sessions.items()}
    return {form: measured.median for form, measured in interleave(runs).items()}


def _write(result: QuantizedOnnx, int8: 'ModelProto', said: dict) -> None:
    """Write the graph, its record and its picture, all or none."""
    import onnx
    import onnxruntime

    record = asdict(result)
    for name in ('out', 'picture', 'record'):
        del record[name]
    record['recipe'] = result.recipe._asdict()
    record['recipes'] = {str(recipe): sqnr for recipe, sqnr in result.recipes.items()}
    record['versions'] = {
        package.__name__: package.__version__ for package in (torch, onnx, onnxruntime)
    }
    # JSON has no infinity, which is the SQNR of outputs that int8 does not change.
    record = json.loads(json.dumps(plain(record)), parse_constant=lambda _: None)
    said = plain({**said, 'int8': record})
    onnx.helper.set_model_props(int8, {'mmrep': json.dumps(said)})
    with atomic_writes(result.record, result.picture, result.out) as (text, picture, graph):
        text.write_text(json.dumps(said, indent=2) + '\n', 'utf-8')
        draw_layers(result.layers, picture)
        onnx.save(int8, graph)
