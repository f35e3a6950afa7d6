"""The readers stand a short fuzz; ``make check`` runs a long one."""

import pytest

pytest.importorskip('h5py')

from fuzzing import fuzz, make_case, outcome


def test_short_fuzz(tally):
    report = fuzz(seconds=2.5, seed=0)
    assert not report.failures, '\n'.join(report.failures[:20])
    tried = sum(report.tried.values())
    tally('fuzzed files', tried)
    assert tried > 50
    assert len(report.tried) == 6
    assert tried / 4 < report.refused < tried


def test_cases_can_be_made_again(tmp_path):
    one, other = (make_case(3, 4, tmp_path).path.read_bytes() for _ in range(2))
    assert one == other != make_case(4, 4, tmp_path).path.read_bytes()


def test_other_errors_are_failures(tmp_path):
    def fail(path):
        raise ValueError('no sentence')

    case = make_case(0, 0, tmp_path)._replace(read=fail)
    assert outcome(case) == 'ValueError: no sentence'


def test_other_contents_are_failures(tmp_path):
    case = make_case(0, 0, tmp_path)._replace(read=lambda path: {'state_dict': {}})
    assert outcome(case) == 'it was read as something else'
