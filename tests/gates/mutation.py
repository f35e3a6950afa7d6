"""Mutation of mmrep/reparam: each small edit of its code has to make a test fail.

    python tests/gates/mutation.py [NAME ...] [--equivalent] [--sample N] [--seed N]

Every mutant (:mod:`mutants`) is tried in a process of its own, forked from one that has
imported torch and the hosts but not mmrep. There the mutant's code is imported in the place
of the module's file, and the tests run until one fails; quick tests, and those that have
killed other mutants, come first. Mutants that no test can kill are listed in
``equivalent_mutants.txt``, each with the reason. They are tried with ``--equivalent`` only;
one that is killed, or no longer exists, must be removed from the list.
"""

import argparse
import gc
import json
import math
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType

import hypothesis
import pytest
import torch
from mutants import Mutant, mutants

ROOT = Path(__file__).parents[2]
TESTS = ROOT / 'tests' / 'reparam'
EQUIVALENT = Path(__file__).with_name('equivalent_mutants.txt')
#: Seconds of CPU time, and of wall time, after which a mutant counts as killed. The wall
#: time depends on the load of the machine; it only has to end a mutant that waits.
COMPUTING_LIMIT, TIME_LIMIT = 150, 900
#: Bytes that a mutant may allocate.
MEMORY_LIMIT = 8 << 30
#: The first tests of a mutant are those that take at most so many seconds.
_QUICK = 0.3
#: Plugins that are switched off, because they take half of the time of quick tests.
_WITHOUT = [f'-pno:{name}' for name in ('cacheprovider', 'logging', 'pytest_cov', 'xdist')]


class FirstFailure:
    """Plugin for pytest: run cheap tests first, and let hypothesis shrink no failure.

    Args:
        costs: The seconds per killed mutant of each test, by its name.
        pipe: Where to write the name of the test that fails.
    """

    def __init__(self, costs: Mapping[str, float], pipe: int) -> None:
        self.costs = costs
        self.pipe = pipe
        #: Tests that cost more are left out.
        self.most = math.inf
        self.seconds: dict[str, float] = {}

    def pytest_sessionstart(self) -> None:
        phases = hypothesis.Phase.explicit, hypothesis.Phase.generate
        hypothesis.settings.register_profile('first failure', phases=phases)
        hypothesis.settings.load_profile('first failure')

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted(
            (item for item in items if self._cost(item) <= self.most), key=self._cost
        )

    def _cost(self, item: pytest.Item) -> float:
        return self.costs.get(item.nodeid, 0.0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        spent = self.seconds.get(report.nodeid, 0.0)
        self.seconds[report.nodeid] = spent + report.duration
        if report.failed:
            os.write(self.pipe, report.nodeid.encode())


def run_tests(module: str, code: CodeType | None, plugin: FirstFailure) -> bool:
    """Whether all tests pass, with ``code``, if any, in the place of a module's own."""
    own_code = SourceFileLoader.get_code

    def get_code(loader: SourceFileLoader, name: str) -> CodeType:
        replace = code is not None and name == f'mmrep.reparam.{module}'
        return code if replace else own_code(loader, name)

    SourceFileLoader.get_code = get_code
    own = TESTS / f'test_{module}.py'
    options = ['-x', '-q', '--tb=no', '--assert=plain', '--rootdir', str(ROOT), *_WITHOUT]
    # The quick ones of the module's own tests kill most mutants.
    for paths, plugin.most in (
        ([own], _QUICK),
        (sorted(TESTS.glob('test_*.py')), math.inf),
    ):
        found = [str(path) for path in paths if path.exists()]
        status = pytest.main([*options, *found], plugins=[plugin]) if found else 0
        if status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            return False
    return True


@dataclass
class Trial:
    """Tests that run in a child process.

    Args:
        child: The id of the process.
        pipe: Where it writes the name of the test that fails, if one does.
    """

    child: int
    pipe: int

    @classmethod
    def start(
        cls, module: str, code: CodeType | None, costs: Mapping[str, float]
    ) -> 'Trial':
        """Run the tests; the child ends with 0 if they pass."""
        reading, writing = os.pipe()
        child = os.fork()
        if child:
            os.close(writing)
            return cls(child, reading)
        passed = False
        try:
            signal.setitimer(signal.ITIMER_PROF, COMPUTING_LIMIT)
            signal.alarm(TIME_LIMIT)
            resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT, MEMORY_LIMIT))
            null = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(null, stream)
            passed = run_tests(module, code, FirstFailure(costs, writing))
        finally:
            os._exit(not passed)

    def killer(self) -> str:
        """The test that failed, of a child that has ended."""
        with open(self.pipe) as file:
            return file.read()


def survivors(
    chosen: list[Mutant], jobs: int, seconds: Mapping[str, float]
) -> Iterator[Mutant]:
    """The mutants with which all tests pass, as they are found.

    Args:
        chosen: The mutants.
        jobs: How many to try at once.
        seconds: What each test takes, by its name.
    """
    running, waiting, kills = {}, chosen[::-1], Counter()
    while running or waiting:
        while waiting and len(running) < jobs:
            mutant = waiting.pop()
            costs = {name: cost / (1 + kills[name]) for name, cost in seconds.items()}
            trial = Trial.start(mutant.module, mutant.code, costs)
            running[trial.child] = mutant, trial
        child, status = os.wait()
        mutant, trial = running.pop(child)
        kills[trial.killer()] += 1
        if status == 0:
            yield mutant
        done = len(chosen) - len(waiting) - len(running)
        if done % 100 == 0:
            print(f'{done:,} of {len(chosen):,} mutants', flush=True)


def warm_up() -> Mapping[str, float] | None:
    """Run the tests without a mutant, and import the libraries that they import.

    The processes of mutants are forked from this one, and so have these imports. The tests
    have to pass with them, too.

    Returns:
        What each test takes, in seconds, by its name; ``None`` if one fails.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        passed = False
        try:
            plugin = FirstFailure({}, writing)
            passed = run_tests('', None, plugin)
            files = {name: getattr(m, '__file__', None) for name, m in sys.modules.items()}
            # Not the whole root, which may also contain the environment with the libraries.
            own = tuple(str(ROOT / folder) for folder in ('mmrep', 'tests', 'tools'))
            names = [n for n, file in files.items() if file and not file.startswith(own)]
            with open(writing, 'w') as file:
                json.dump([names, plugin.seconds], file)
        finally:
            os._exit(not passed)
    os.close(writing)
    with open(reading) as file:
        text = file.read()
    _, status = os.waitpid(child, 0)
    if status:
        return None
    names, seconds = json.loads(text)
    for name in names:
        with suppress(Exception):
            import_module(name)
    # A collection in a child would touch, and so copy, all of the memory.
    gc.freeze()
    # A test that fails because of the imports would seem to kill every mutant.
    _, status = os.waitpid(Trial.start('', None, seconds).child, 0)
    return None if status else seconds


def equivalent_mutants() -> set[str]:
    """Names of mutants that no test can kill; the reasons are indented below them."""
    lines = EQUIVALENT.read_text().splitlines()
    return {line for line in lines if line and line[0] not in '# '}


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        'texts', nargs='*', help='only mutants with one of these in the name'
    )
    parser.add_argument(
        '--equivalent',
        action='store_true',
        help='try also those that are listed as equivalent; each of them runs all tests',
    )
    parser.add_argument('--sample', type=int, help='how many to draw (default: all)')
    parser.add_argument('--seed', type=int, default=0, help='for the sample (default: 0)')
    parser.add_argument('--jobs', type=int, default=os.cpu_count(), help='default: CPUs')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # Without bytecode, each mutant's process would compile all modules again.
        sys.dont_write_bytecode, sys.pycache_prefix = False, folder
        return try_mutants(args)


def try_mutants(args: argparse.Namespace) -> int:
    """Run the mutants that the command line asks for; returns the exit code."""
    torch.set_num_threads(1)
    begin = time.monotonic()
    everything = [
        mutant
        for path in sorted((ROOT / 'mmrep' / 'reparam').glob('*.py'))
        for mutant in mutants(path.read_text(), path.stem, str(path))
    ]
    equivalent = equivalent_mutants()
    chosen = [
        m
        for m in everything
        if (not args.texts or any(t in m.name for t in args.texts))
        and (args.equivalent or m.name not in equivalent)
    ]
    if args.sample:
        chosen = random.Random(args.seed).sample(chosen, min(args.sample, len(chosen)))
    if (seconds := warm_up()) is None:
        print('mutation: the tests fail without any mutant')
        return 1
    found = []
    for mutant in survivors(chosen, args.jobs, seconds):
        found.append(mutant.name)
        if mutant.name not in equivalent:
            print(f'survives: {mutant.name} (line {mutant.line})', flush=True)
    tried = {mutant.name for mutant in chosen}
    known = {mutant.name for mutant in everything}
    stale = [n for n in equivalent if n not in known or (n in tried and n not in found)]
    for name in stale:
        print(f'not equivalent: {name}')
    bad = len([name for name in found if name not in equivalent])
    print(
        f'mutants: {len(chosen):,}, killed: {len(chosen) - len(found):,}, '
        f'survived: {bad}, listed as equivalent: {len(equivalent)} '
        f'({(time.monotonic() - begin) / 60:.0f} min)'
    )
    return int(bool(bad or stale))


if __name__ == '__main__':
    sys.exit(main())
