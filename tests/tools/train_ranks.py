"""Train several times, one after the other, in the processes of one job.

The argument is a JSON list with the arguments of every training.
"""

import json
import sys
from contextlib import suppress

from tool_runs import load

from mmrep.cli import run_tool


def main() -> None:
    train = load('train').main
    for arguments in json.loads(sys.argv[1]):
        sys.argv = ['train.py', *arguments, '--launcher', 'pytorch', '--no-validate']
        # A StopHook stops all processes alike.
        with suppress(KeyboardInterrupt):
            train()


if __name__ == '__main__':
    run_tool(main)
