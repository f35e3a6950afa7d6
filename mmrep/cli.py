"""What the command-line tools share."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from mmengine.config import Config, DictAction
from torch import distributed

from mmrep.deployment import for_one_process
from mmrep.errors import UserError

#: What a launcher tells its processes, and how to start them.
_LAUNCHERS = {
    'pytorch': ('RANK', 'start with tools/dist_train.sh, tools/dist_test.sh or torchrun'),
    'slurm': ('SLURM_PROCID', 'start with tools/slurm_train.sh or srun'),
    'mpi': ('OMPI_COMM_WORLD_LOCAL_RANK', 'start with mpirun'),
}


def run_tool(main: Callable[[], None]) -> None:
    """Run a tool; end it with one sentence and exit status 1 if the user can mend it."""
    try:
        main()
    except UserError as error:
        sys.exit(f'error: {error}')
    except FileNotFoundError as error:
        # The data that a config names, mostly.
        sys.exit(f'error: {error.filename or error} does not exist: check the path')
    except OSError as error:
        # '[Errno 13] Permission denied: out.pth', less the number.
        sys.exit(f'error: {str(error).partition("] ")[2] or error}')
    _leave_process_group()


def _leave_process_group() -> None:
    """End the threads of torch.distributed, in all processes of a job at once.

    One that still runs when Python ends may abort the process, and with it the job. A
    process that failed does not wait here for the others: the launcher ends them.
    """
    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def shape_argument(text: str) -> tuple[int, int, int]:
    """``'3,224,224'``, ``'224,224'`` or ``'224'`` as channels, height and width."""
    try:
        numbers = [int(part) for part in text.replace('x', ',').split(',')]
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= 3 or min(numbers) < 1:
        raise argparse.ArgumentTypeError(
            f'{text!r} is no shape: give C,H,W or H,W or one number, as 3,224,224'
        )
    size = numbers if len(numbers) == 1 else numbers[-2:]
    channels = numbers[0] if len(numbers) == 3 else 3
    return channels, size[0], size[-1]


def add_runner_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of tools that run a Runner, as in mmpretrain and mmseg."""
    parser.add_argument('--work-dir', help='where logs and checkpoints go')
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
