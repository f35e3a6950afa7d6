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

# Hundreds of processes import this project: none is to compile it anew.
os.environ.pop('PYTHONDONTWRITEBYTECODE', None)

# The tensors are small: more threads only get into each other's way.
torch.set_num_threads(1)
os.environ['OMP_NUM_THREADS'] = '1'


def pytest_collection_finish() -> None:
    """Leave the hosts out of garbage collections, each of which takes half a second."""
    gc.collect()
    gc.freeze()


FORMAT = yapf_api.FormatCode

#: Where mmengine takes the formatter of configs from: its own module, or OneDL's yapf's.
FORMATTER = next(
    f'{module.__name__}.FormatCode'
    for module in (mmengine_config, yapf_api)
    if hasattr(module, 'FormatCode')
)


@pytest.fixture(autouse=True, scope='session')
def unformatted() -> Iterator[None]:
    """mmengine does not format the configs that it writes, nor those that it compares.

    It takes half of what a tool needs for a tiny network. In new processes, which ``make
    check`` has, tools format them.
    """

    def ended(text: str, **_) -> tuple[str, bool]:
        return f'{text}\n', True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FORMATTER, ended)
        yield


@pytest.fixture
def formatted(monkeypatch) -> None:
    """mmengine formats configs, as it does in the processes of tools."""
    monkeypatch.setattr(FORMATTER, FORMAT)


@pytest.fixture
def format_by(monkeypatch) -> Callable[[Callable | None], None]:
    """Lets mmengine format configs by a function, or fail by none."""
    return partial(monkeypatch.setattr, FORMATTER)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from one seed."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope='module')
def no_scope() -> None:
    """Every module starts without the default scope that another's configs have set."""
    DefaultScope._instance_dict.clear()


#: What sets the figures in the summary apart from other properties of a test.
TALLY, WORST = 'tally: ', 'worst '


@pytest.fixture
def tally(record_property) -> Callable[..., None]:
    """Counts what a test tried: ``tally('bit flips', 200)``; one where no number is given.

    The summary of the run adds up what the tests that passed have counted.
    """

    def count(what: str, number: int = 1) -> None:
        record_property(TALLY + what, number)

    return count


@pytest.fixture
def worst(record_property) -> Callable[[str, float], None]:
    """Notes an error that a test allows; the summary of the run has the largest one."""

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
