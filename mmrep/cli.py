"""What the command-line tools share."""

import argparse
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from os.path import expanduser
from pathlib import Path

from mmengine.config import Config, DictAction
from torch import distributed

from mmrep.deployment import for_one_process
from mmrep.errors import UserError, reason

#: What a launcher tells its processes, and how to start them.
_LAUNCHERS = {
    'pytorch': ('RANK', 'start with tools/dist_train.sh, tools/dist_test.sh or torchrun'),
    'slurm': ('SLURM_PROCID', 'start with tools/slurm_train.sh or srun'),
    'mpi': ('OMPI_COMM_WORLD_LOCAL_RANK', 'start with mpirun'),
}

#: What may be wrong with a path of the user's; one that names none is another's.
_PATH_ERRORS = (
    FileExistsError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)


def run_tool(main: Callable[[], None]) -> None:
    """Run a tool; end it with one sentence and exit status 1 if the user can mend it.

    Other errors of the system, as a full disk or a lost connection in the middle of a
    training, end with a sentence, too, but after their traceback.
    """
    try:
        main()
    except UserError as error:
        sys.exit(f'error: {error}')
    except OSError as error:
        if not (isinstance(error, _PATH_ERRORS) and error.filename):
            traceback.print_exc()
        elif isinstance(error, FileNotFoundError):
            # The data that a config names, mostly.
            sys.exit(f'error: {error.filename} does not exist: check the path')
        if error.errno is None:
            sys.exit(f'error: {reason(error)}')
        sys.exit(f'error: {str(error).removeprefix(f"[Errno {error.errno}] ")}')
    _leave_process_group()


def _leave_process_group() -> None:
    """End the threads of torch.distributed, in all processes of a job at once.

    One that still runs when Python ends may abort the process, and with it the job. A
    process that failed does not wait here for the others: the launcher ends them.
    """
    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def path_argument(text: str) -> Path:
    """A path, which may begin with ``~``."""
    return Path(text).expanduser()


class ToolParser(argparse.ArgumentParser):
    """A parser whose ``--shape`` takes numbers apart, too, as the hosts' tools do.

    With ``nargs='+'``, argparse would take the positionals after them for numbers.
    """

    def parse_known_args(self, args: Sequence[str] | None = None, namespace=None):
        """Join the numbers after ``--shape`` by commas."""
        rest, joined = list(sys.argv[1:] if args is None else args), []
        while rest:
            joined.append(rest.pop(0))
            numbers = []
            while joined[-1] == '--shape' and rest and re.fullmatch(r'[-\d.,x]+', rest[0]):
                numbers.append(rest.pop(0))
            if numbers:
                # With the sign, a negative number is no option.
                joined[-1] = f'--shape={",".join(numbers)}'
        return super().parse_known_args(joined, namespace)


def shape_argument(text: str) -> tuple[int, int, int]:
    """``'3,224,224'``, ``'224,224'`` or ``'224'`` as channels, height and width."""
    try:
        numbers = [int(part) for part in text.replace('x', ',').split(',')]
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= 3 or min(numbers) < 1:
        raise argparse.ArgumentTypeError(
            f'{text!r} is no shape: give C,H,W or H,W or one number, as 3,224,224 '
            'or 3 224 224'
        )
    size = numbers if len(numbers) == 1 else numbers[-2:]
    channels = numbers[0] if len(numbers) == 3 else 3
    return channels, size[0], size[-1]


def add_runner_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of tools that run a Runner, as in mmpretrain and mmseg."""
    parser.add_argument('--work-dir', type=expanduser, help='where logs and checkpoints go')
    add_config_options(parser)
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='how the processes of a distributed job are started (default: none)',
    )
    # torch.distributed.launch passes it; torchrun sets the variable itself.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """The argument that overrides entries of a config."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        help='override entries of the config, as key=value or key="[a,b]"',
    )


def prepare_run(cfg: Config, args: argparse.Namespace) -> None:
    """Apply :func:`add_runner_arguments` to a config.

    Raises:
        UserError: If the launcher did not start this process.
    """
    variable, remedy = _LAUNCHERS.get(args.launcher, (None, None))
    if variable and variable not in os.environ:
        raise UserError(f'--launcher {args.launcher} needs {variable}: {remedy}')
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg.launcher = args.launcher
    if args.launcher == 'none':
        cfg.model = for_one_process(cfg.model)
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs') / Path(args.config).stem)
