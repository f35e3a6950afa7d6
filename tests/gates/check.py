"""Run the gates one after the other, and print a table of their figures at the end.

    python tests/gates/check.py [GATE ...] [--seconds N] [--sample N] [--seed N]

The gates are ``suite``, ``mutation`` and ``fuzz``, the default is all of them. The exit
code is 1 if one fails.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: The parts of mmrep that the tests have to cover.
COVERED = ('reparam', 'models', 'expansion', 'checkpoints')
#: The largest fraction of a part's lines and branches that no test may reach.
UNCOVERED = 0.03


def run(*command: str, **environment: str) -> tuple[bool, list[str]]:
    """Run Python in the repository's root; returns success and the lines it prints."""
    lines = []
    with subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        for line in process.stdout:
            print(line, end='', flush=True)
            lines.append(line.strip(' =\n'))
    return process.returncode == 0, lines


def suite(args: argparse.Namespace) -> tuple[bool, list[str]]:
    """Run all tests, including the long ones, and measure their coverage."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, 'coverage.json')
        passed, lines = run(
            *('-m', 'pytest', 'tests', '-n', 'auto', '--maxprocesses', '8'),
            *('--cov', f'--cov-report=json:{report}', *shlex.split(args.pytest)),
            COVERAGE_FILE=str(Path(folder, 'coverage')),
            MMREP_NEW_PROCESSES='1',
        )
        missing = uncovered(report) if report.exists() else {}
    enough = bool(missing) and max(missing.values()) <= UNCOVERED
    parts = ', '.join(f'{part} {fraction:.1%}' for part, fraction in missing.items())
    counted = [line for line in lines if ' · ' in line]
    figures = [*counted, lines[-1], f'lines and branches not covered: {parts}']
    return passed and enough, figures


def uncovered(report: Path) -> Mapping[str, float]:
    """The fraction of lines and branches that were not reached, by part of mmrep."""
    everything, missing = Counter(), Counter()
    for name, file in json.loads(report.read_text())['files'].items():
        part, numbers = Path(name).parts[1], file['summary']
        if part in COVERED:
            everything[part] += numbers['num_statements'] + numbers['num_branches']
            missing[part] += numbers['missing_lines'] + numbers['missing_branches']
    return {part: missing[part] / everything[part] for part in COVERED if everything[part]}


def mutation(args: argparse.Namespace) -> tuple[bool, list[str]]:
    """Check that every small edit of mmrep/reparam makes a test fail."""
    sample = ['--sample', str(args.sample)] if args.sample else []
    passed, lines = run('tests/gates/mutation.py', *sample, '--seed', str(args.seed))
    return passed, lines[-1:]


def fuzz(args: argparse.Namespace) -> tuple[bool, list[str]]:
    """Check that no file crashes the readers, hangs them or takes all memory."""
    script = (
        'import sys; sys.path[:0] = ["tests/checkpoints", "tests"]; import fuzzing;'
        f'report = fuzzing.fuzz({args.seconds}, {args.seed});'
        'print(*report.failures, sep="\\n");'
        'tried, wrong = sum(report.tried.values()), len(report.failures);'
        f'print(f"fuzzed files: {{tried:,}} in {args.seconds:g} s, wrong: {{wrong}}");'
        'sys.exit(not tried or wrong > 0)'
    )
    passed, lines = run('-c', script)
    return passed, lines[-1:]


GATES = {gate.__name__: gate for gate in (suite, mutation, fuzz)}


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        'gates', nargs='*', metavar='GATE', help=f'default: {" ".join(GATES)}'
    )
    parser.add_argument('--pytest', default='', help="options for pytest: --pytest='-x'")
    parser.add_argument('--seconds', type=float, default=300, help='length of the fuzz')
    parser.add_argument('--sample', type=int, help='number of mutants (default: all)')
    parser.add_argument('--seed', type=int, default=0, help='for the fuzz and the sample')
    args = parser.parse_args()
    if unknown := set(args.gates) - set(GATES):
        parser.error(f'no such gate: {", ".join(unknown)}; choose from {", ".join(GATES)}')
    table, good = [], True
    for name in args.gates or GATES:
        begin = time.monotonic()
        print(f'--- {name}', flush=True)
        passed, figures = GATES[name](args)
        good &= passed
        minutes = (time.monotonic() - begin) / 60
        table.append(f'{name:9} {"passed" if passed else "FAILED"} {minutes:5.1f} min')
        table += [f'    {figure}' for figure in figures]
    print('', *table, sep='\n')
    return int(not good)


if __name__ == '__main__':
    sys.exit(main())
