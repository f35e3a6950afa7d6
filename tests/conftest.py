"""Settings of all tests."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import Phase, settings
from mmengine.registry import DefaultScope

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

# The tensors are small: more threads only get into each other's way.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from one seed."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope='module')
def no_scope() -> None:
    """Every module starts without the default scope that another's configs have set."""
    DefaultScope._instance_dict.clear()


@pytest.fixture
def tally(record_property) -> Callable[..., None]:
    """Counts what a test tried: ``tally('bit flips', 200)``; one where no number is given.

    The summary of the run adds up what the tests that passed have counted.
    """

    def count(what: str, number: int = 1) -> None:
        record_property(TALLY + what, number)

    return count


#: What sets the counts apart from other properties of a test.
TALLY = 'tally: '


def pytest_terminal_summary(terminalreporter) -> None:
    """Print what the tests have counted."""
    counts = Counter()
    for report in terminalreporter.getreports('passed'):
        for name, number in report.user_properties:
            if name.startswith(TALLY):
                counts[name.removeprefix(TALLY)] += number
    if counts:
        line = ' · '.join(f'{what}: {number:,}' for what, number in counts.items())
        terminalreporter.write_line(line)
