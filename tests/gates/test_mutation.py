"""A run tells passing tests from failing ones."""

import os

import mutation
import pytest


@pytest.mark.parametrize(('before', 'after'), [(True, True), (True, False), (False, True)])
def test_tests_that_fail_without_a_mutant_are_noticed(
    before, after, monkeypatch, tmp_path
) -> None:
    """Before the imports that all mutants share, or after them."""
    ran = tmp_path / 'ran'

    def run_tests(module, code, plugin) -> bool:
        passed = after if ran.exists() else before
        ran.touch()
        if not passed:
            os.write(plugin.pipe, b'tests/reparam/test_fold.py::test_refuses')
        return passed

    monkeypatch.setattr(mutation, 'run_tests', run_tests)
    assert (mutation.warm_up() is not None) is (before and after)
