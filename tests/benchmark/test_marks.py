"""The benchmarks start, and say what they measured."""

from pathlib import Path

import pytest
from processes import run_python

MARKS = Path(__file__).parents[2] / 'benchmarks' / 'marks.py'


@pytest.mark.long
def test_a_group_is_measured_and_written(tmp_path):
    out = tmp_path / 'marks.json'
    options = ('--groups', 'memory', '--rounds', '1', '--out', out)
    ran = run_python(MARKS, *options, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert 'kept by a DBB' in ran.stdout and 'with_cp=True' in out.read_text()
    assert '| kept by a DBB: with_cp=True / input |' in out.with_suffix('.md').read_text()
