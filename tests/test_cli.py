"""What the tools share, around their work."""

import subprocess
import sys

import pytest

TOOL = """
from torch import distributed
from mmrep.cli import run_tool
from mmrep.errors import UserError

def main():
    if {grouped}:
        store = distributed.HashStore()
        distributed.init_process_group('gloo', store=store, rank=0, world_size=1)
    {then}

run_tool(main)
print('ended, in a group:', distributed.is_initialized())
"""


def run(**parts: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, '-c', TOOL.format(**parts)],
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize('grouped', [True, False])
def test_a_tool_leaves_its_process_group(grouped):
    done = run(grouped=grouped, then=f'assert distributed.is_initialized() is {grouped}')
    assert done.returncode == 0, done.stderr
    assert done.stdout == 'ended, in a group: False\n'


def test_a_tool_that_failed_waits_for_nobody():
    # A barrier would wait for the others of a job.
    wait = 'distributed.barrier = None; raise UserError("mend this")'
    done = run(grouped=True, then=wait)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == 'error: mend this'
    assert 'Traceback' not in done.stderr
    assert done.stdout == ''
