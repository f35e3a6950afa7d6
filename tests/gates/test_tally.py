"""The summary of a run has the counts of the tests that passed."""

from pathlib import Path

pytest_plugins = ['pytester']
CONFTEST = Path(__file__).parents[1] / 'conftest.py'


def test_the_summary_adds_up_what_passed_tests_counted(pytester) -> None:
    pytester.makeconftest(CONFTEST.read_text())
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.parametrize('case', range(3))
        def test_bad_input(tally, case):
            tally('bad inputs')
            assert case < 2

        def test_flips(tally, record_property):
            record_property('flips', 5)
            tally('bit flips', 1200)
            tally('bit flips', 34)

        def test_skipped(tally):
            tally('kills', 50)
            pytest.skip('no kill today')
        """
    )
    lines = pytester.runpytest_inprocess().stdout.lines
    assert 'bad inputs: 2 · bit flips: 1,234' in lines


def test_the_summary_says_nothing_where_nothing_was_counted(pytester) -> None:
    pytester.makeconftest(CONFTEST.read_text())
    pytester.makepyfile('def test_nothing(tally): pass')
    assert ' · ' not in pytester.runpytest_inprocess().stdout.str()
