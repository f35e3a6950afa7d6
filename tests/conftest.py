"""Settings of all tests."""

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
