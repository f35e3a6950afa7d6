"""Which recipe is best, and which layers cost most."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip('onnxruntime')

from onnx_graphs import Graph, images

from mmrep.quantization import METHODS, Recipe
from mmrep.quantization.progress import untracked
from mmrep.quantization.quantizer import Quantizer
from mmrep.quantization.search import Search, fewest
from mmrep.quantization.sessions import Error, total_sqnr


@given(st.integers(0, 40), st.integers(1, 50))
def test_fewest_is_the_smallest(most, threshold):
    asked = []

    def is_enough(number):
        asked.append(number)
        return number >= threshold

    expected = threshold if threshold <= most else None
    assert fewest(most, is_enough) == expected
    assert all(1 <= number <= most for number in asked)
    assert len(asked) <= 2 * np.log2(most + 2) + 1


@given(st.lists(st.booleans(), max_size=30))
def test_fewest_of_what_is_not_monotone(holds):
    """The condition holds for the answer, and was seen not to hold for one below."""
    answer = fewest(len(holds), lambda number: holds[number - 1])
    if answer is None:
        assert not holds or not holds[-1]
    else:
        assert holds[answer - 1]
        assert answer == 1 or not holds[answer - 2]


def network():
    """A sensitive conv, with one channel of a range of its own, between two others."""
    graph = Graph(seed=2)
    x = graph.node('Relu', graph.conv('input', 6, 8))
    x = graph.node('Relu', graph.conv(x, 8, 8))
    return graph.model(graph.conv(x, 8, 4))


def test_recipes_from_the_best_on():
    search = Search(Quantizer(network(), images(6)))
    recipes = [Recipe(m, c) for m in METHODS for c in (False, True)]
    titles = []

    def track(items, title):
        titles.append(title)
        return items

    found = search.recipes(recipes, track)
    assert set(found) == set(recipes) and titles == ['trying recipes']
    assert list(found.values()) == sorted(found.values(), reverse=True)
    # Ranges of channels differ by orders of magnitude.
    assert next(iter(found)).per_channel and not [*found][-1].per_channel


def test_layers_from_the_worst_on():
    quantizer = Quantizer(network(), images(6))
    recipe = Recipe('minmax', False)
    found = Search(quantizer).layers(recipe, untracked)
    assert set(found) == set(quantizer.layers)
    assert list(found.values()) == sorted(found.values())
    # Not the order in which they stand, and less noise than that of all together.
    assert list(found) != quantizer.layers and len({*found.values()}) == 3
    (whole,) = Search(quantizer).recipes([recipe], untracked).values()
    assert min(found.values()) > whole
    # Leaving the worst in fp32 helps more than leaving the best.
    first, *_, last = found
    sqnr = [
        next(iter(Search(quantizer, [name]).recipes([recipe], untracked).values()))
        for name in (first, last)
    ]
    assert sqnr[0] > sqnr[1]
    assert first not in Search(quantizer, [first]).layers(recipe, untracked)


def test_sqnr_of_several_outputs():
    """One that is exact hides nothing of another."""
    exact, noisy = Error(signal=1.0, noise=0.0), Error(signal=100.0, noise=1.0)
    assert total_sqnr([noisy]) == pytest.approx(20)
    assert total_sqnr([exact, noisy]) == pytest.approx(20 + 10 * np.log10(2))
    assert total_sqnr([exact]) == np.inf
    assert total_sqnr([exact, Error(signal=0.0, noise=1.0)]) < 4


def test_error_over_batches():
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((7, 5, 3, 2))
    output = reference + 0.1 * rng.standard_normal(reference.shape)
    error = Error()
    for part in (slice(0, 3), slice(3, 7)):
        error.add(reference[part].astype(np.float32), output[part].astype(np.float32))
    noise = ((output - reference) ** 2).mean()
    assert error.sqnr == pytest.approx(10 * np.log10((reference**2).mean() / noise), 1e-4)
    agree = (reference.argmax(1) == output.argmax(1)).mean()
    assert error.agreement == pytest.approx(agree) and 0 < agree < 1
    same = Error()
    same.add(reference, reference)
    assert same.sqnr == np.inf and same.agreement == 1 == Error().agreement
    zero = Error()
    zero.add(0 * reference, output)
    assert zero.sqnr == -np.inf
