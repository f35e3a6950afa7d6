"""A run distinguishes passing from failing tests, and ends mutants that hang."""

import itertools
import os
import signal
import time

import mutation
import pytest


@pytest.mark.parametrize(('before', 'after'), [(True, True), (True, False), (False, True)])
def test_tests_that_fail_without_a_mutant_are_noticed(
    before, after, monkeypatch, tmp_path
) -> None:
    """Whether they fail before or after the imports that all mutants share."""
    ran = tmp_path / 'ran'

    def run_tests(module, code, plugin) -> bool:
        passed = after if ran.exists() else before
        ran.touch()
        if not passed:
            os.write(plugin.pipe, b'tests/reparam/test_fold.py::test_refuses')
        return passed

    monkeypatch.setattr(mutation, 'run_tests', run_tests)
    assert (mutation.warm_up() is not None) is (before and after)


@pytest.mark.parametrize(
    ('never_ends', 'computing', 'killed_by'),
    [
        (lambda: all(itertools.count(1)), 0.1, signal.SIGPROF),
        (lambda: time.sleep(60), 60, signal.SIGALRM),
    ],
    ids=['computes', 'waits'],
)
def test_mutant_that_never_ends_is_killed(
    never_ends, computing, killed_by, monkeypatch
) -> None:
    monkeypatch.setattr(mutation, 'run_tests', lambda *_: never_ends())
    monkeypatch.setattr(mutation, 'COMPUTING_LIMIT', computing)
    monkeypatch.setattr(mutation, 'TIME_LIMIT', 1)
    _, status = os.waitpid(mutation.Trial.start('fold', None, {}).child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == killed_by
