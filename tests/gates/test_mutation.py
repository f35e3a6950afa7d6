"""A run tells passing tests from failing ones."""

import os

import mutation
import pytest


@pytest.mark.parametrize('passed', [True, False])
def test_tests_that_fail_without_a_mutant_are_noticed(passed, monkeypatch) -> None:
    def run_tests(module, code, plugin) -> bool:
        if not passed:
            os.write(plugin.pipe, b'tests/reparam/test_fold.py::test_refuses')
        return passed

    monkeypatch.setattr(mutation, 'run_tests', run_tests)
    assert (mutation.warm_up() is not None) is passed
