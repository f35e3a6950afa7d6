"""Settings of all tests."""

import gc
import os
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from hypothesis import Phase, settings
from mmengine.config import config as mmengine_config
from mmengine.registry import DefaultScope
from yapf.yapflib import yapf_api

settings.register_profile(
    'mmrep',
    derandomize=True,
    deadline=None,
    max_examples=25,
    database=None,
    # Explaining a failure takes minutes.
    phases=set(Phase) - {Phase.explain},
)
settings.load_profile('mmrep')

# Hundreds of processes import this project: they share its bytecode.
os.environ.pop('PYTHONDONTWRITEBYTECODE', None)

# The tensors are small: more threads are slower.
torch.set_num_threads(1)
os.environ['OMP_NUM_THREADS'] = '1'


def pytest_collection_finish() -> None:
    """Exclude the imported hosts from garbage collection, which takes half a second."""
    gc.collect()
    gc.freeze()


FORMAT = yapf_api.FormatCode

#: The formatter of configs: a name in mmengine's module, or, with OneDL's, in yapf's.
FORMATTER = next(
    f'{module.__name__}.FormatCode'
    for module in (mmengine_config, yapf_api)
    if hasattr(module, 'FormatCode')
)


@pytest.fixture(autouse=True, scope='session')
def unformatted() -> Iterator[None]:
    """Switch off mmengine's formatting of the configs that it writes and compares.

    It takes half of the time of a tool on a tiny network. In new processes, as ``make
    check`` starts them, the tools format configs.
    """

    def ended(text: str, **_) -> tuple[str, bool]:
        return f'{text}\n', True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FORMATTER, ended)
        yield


@pytest.fixture
def formatted(monkeypatch) -> None:
    """Let mmengine format configs, as it does in the processes of tools."""
    monkeypatch.setattr(FORMATTER, FORMAT)


@pytest.fixture
def format_by(monkeypatch) -> Callable[[Callable | None], None]:
    """Set the function by which mmengine formats configs; with None formatting fails."""
    return partial(monkeypatch.setattr, FORMATTER)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from one seed."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope='module')
def no_scope() -> None:
    """Remove the default scopes that the configs of other test modules have set."""
    DefaultScope._instance_dict.clear()


#: Prefixes of the properties of a test that are figures for the summary.
TALLY, WORST = 'tally: ', 'worst '


@pytest.fixture
def tally(record_property) -> Callable[..., None]:
    """Count what a test tried: ``tally('bit flips', 200)``; without a number, one.

    The summary of the run has the sums over the tests that passed.
    """

    def count(what: str, number: int = 1) -> None:
        record_property(TALLY + what, number)

    return count


@pytest.fixture
def worst(record_property) -> Callable[[str, float], None]:
    """Record an error that a test allows; the summary of the run has the largest."""

    def note(what: str, error: float) -> None:
        record_property(WORST + what, error)

    return note


def pytest_terminal_summary(terminalreporter) -> None:
    """Print what the tests that passed have counted and measured."""
    counts, errors = Counter(), {}
    for report in terminalreporter.getreports('passed'):
        for name, number in report.user_properties:
            if name.startswith(TALLY):
                counts[name.removeprefix(TALLY)] += number
            elif name.startswith(WORST):
                errors[name] = max(number, errors.get(name, 0))
    figures = [f'{what}: {number:,}' for what, number in counts.items()]
    figures += [f'{what}: {error:.1e}' for what, error in errors.items()]
    if figures:
        terminalreporter.write_line(' · '.join(figures))
