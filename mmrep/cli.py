"""Shared code of the command-line tools."""

import argparse
import keyword
import logging
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from os.path import expanduser
from pathlib import Path
from typing import Any, NoReturn

from mmengine.config import Config, DictAction
from mmengine.logging import print_log
from rich.console import Console
from rich.status import Status
from torch import distributed

from mmrep.deployment import building_fault, config_of, for_one_process
from mmrep.errors import ConfigError, UserError, printable, reason

#: The environment variable that a launcher sets, and how to start a job with it.
_LAUNCHERS = {
    'pytorch': ('RANK', 'start with tools/dist_train.sh, tools/dist_test.sh or torchrun'),
    'slurm': ('SLURM_PROCID', 'start with tools/slurm_train.sh or srun'),
    'mpi': ('OMPI_COMM_WORLD_LOCAL_RANK', 'start with mpirun'),
}

#: Errors of a path that the user gave, if they have a file name.
_PATH_ERRORS = (
    FileExistsError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)


#: The exit status of a process that SIGINT ended, as shells report it.
_INTERRUPTED = 130

#: The most characters of an error that are shown; lists of keys can be long.
_SHOWN = 2000


def busy(with_what: str) -> Status:
    """A spinner on standard error while a ``with`` statement runs; none in a file."""
    # The file is fixed, since a tool may redirect sys.stderr at its work.
    return Console(file=sys.stderr, markup=False).status(with_what)


def run_tool(main: Callable[[], None]) -> None:
    """Run a tool, and end it with the exit status that says how it went.

    - 0 only if it did its work, or printed its help: a ``sys.exit(0)`` in the code of a
      config or a model is an error.
    - 1 with one sentence if the user can mend the error: a
      :class:`~mmrep.errors.UserError`, a wrong path, or an error that mmengine raised while
      it built a part of the config (:func:`~mmrep.deployment.building_fault`); mmengine's
      log has the traceback of the last with ``--cfg-options log_level=DEBUG``.
    - 1 with a traceback for any other error, as one in the forward pass of a model. Other
      errors of the system, as a full disk or a lost connection, add one sentence to it.
    - 2 if the command line is wrong, as in argparse.
    - 130 after a ``KeyboardInterrupt``, raised by the user or by a config.
    """
    try:
        main()
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        sys.exit(_INTERRUPTED)
    except SystemExit as error:
        if error.code not in (0, None) or _exits_by_help(error):
            raise
        sys.exit(
            'error: the code of the config or the model ended the tool by sys.exit(): '
            'remove that call'
        )
    except UserError as error:
        sys.exit(f'error: {printable(error, _SHOWN)}')
    except OSError as error:
        if not (isinstance(error, _PATH_ERRORS) and error.filename):
            _end_if_built(error)
            traceback.print_exc()
        elif isinstance(error, FileNotFoundError):
            # The data that a config names, mostly.
            name = printable(error.filename, 200)
            sys.exit(f'error: {name} does not exist: check the path')
        if error.errno is None:
            sys.exit(f'error: {reason(error)}')
        message = str(error).removeprefix(f'[Errno {error.errno}] ')
        sys.exit(f'error: {printable(message, _SHOWN)}')
    except Exception as error:
        _end_if_built(error)
        raise
    _leave_process_group()


def _end_if_built(error: Exception) -> None:
    """End the tool with one sentence if an error came from building a config."""
    fault = building_fault(error)
    if fault:
        text = ''.join(traceback.format_exception(error))
        print_log(text, logger='current', level=logging.DEBUG)
        sys.exit(f'error: {fault}')


def _exits_by_help(error: SystemExit) -> bool:
    """Whether argparse exited after it printed the help."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get('__name__') == 'argparse'


def _leave_process_group() -> None:
    """End the threads of torch.distributed, in all processes of a job at once.

    A thread that still runs when Python ends may abort the process, and with it the job. A
    process that failed does not call this: the launcher ends the others.
    """
    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def config_argument(text: str) -> str:
    """The path of a config: as it is given, or found by the name of a shipped config."""
    text = name_argument(text)
    if not re.fullmatch(r'[\w-]{1,99}', text) or os.path.lexists(text):
        return text
    try:
        return str(config_of(text))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def name_argument(text: str) -> str:
    """The name of a file or folder, or a URL; not empty.

    An unset shell variable gives an empty name, which would be the current folder.
    """
    if not text:
        raise argparse.ArgumentTypeError('it is empty: give a name')
    return expanduser(text)


def path_argument(text: str) -> Path:
    """A path, which may begin with ``~``."""
    return Path(name_argument(text))


def whole_number(least: int, most: int = 2**63 - 1) -> Callable[[str], int]:
    """The type of an argument that is a whole number of at most 64 bits."""

    def parse(text: str) -> int:
        # Python refuses to parse thousands of digits, and torch more than 19.
        number = int(text) if re.fullmatch(r'\s*[-+]?\d{1,20}\s*', text) else None
        if number is None or not least <= number <= most:
            raise argparse.ArgumentTypeError(
                f'{printable(text, 40)!r} is not a whole number from {least} to {most}'
            )
        return number

    return parse


def rtol_argument(text: str) -> float:
    """The largest relative error allowed: more than 0 and less than 1.

    With 1 or more, a model whose outputs are all zero would pass.
    """
    rtol = _number(text)
    if not 0 < rtol < 1:
        raise argparse.ArgumentTypeError(
            f'{printable(text, 40)!r} is not a relative error: give a number between 0 and '
            '1, as 1e-4'
        )
    return rtol


def seconds_argument(text: str) -> float:
    """A time in seconds."""
    seconds = _number(text)
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(
            f'{printable(text, 40)!r} is not a number of seconds'
        )
    return seconds


def drop_argument(text: str) -> float:
    """The largest loss of a metric that is allowed, in the unit of the metric."""
    drop = _number(text)
    if not 0 <= drop < math.inf:
        raise argparse.ArgumentTypeError(
            f'{printable(text, 40)!r} is not a loss of a metric: give a number, as 0.5'
        )
    return drop


def _number(text: str) -> float:
    """A text as a number; NaN if it is not one."""
    try:
        return float(text)
    except ValueError:
        return math.nan


class ToolParser(argparse.ArgumentParser):
    """A parser whose ``--shape`` also takes separate numbers, as the hosts' tools do.

    With ``nargs='+'``, argparse would take positional arguments after the numbers for more
    numbers. The errors of this parser are cut to ``_SHOWN`` characters.

    Args:
        example: Arguments of the example at the end of the help. Default: '', no example.
        **kwargs: See ``argparse.ArgumentParser``.
    """

    def __init__(self, example: str = '', **kwargs: Any) -> None:
        epilog = f'example: %(prog)s {example}' if example else None
        super().__init__(epilog=epilog, **kwargs)

    def error(self, message: str) -> NoReturn:
        """End with the usage and a message."""
        super().error(printable(message, _SHOWN))

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """Join the numbers after ``--shape`` by commas."""
        rest, joined = list(sys.argv[1:] if args is None else args), []
        while rest:
            joined.append(rest.pop(0))
            numbers = []
            while joined[-1] == '--shape' and rest and re.fullmatch(r'[-\d.,x]+', rest[0]):
                numbers.append(rest.pop(0))
            if numbers:
                # With '=', a negative number is not taken for an option.
                joined[-1] = f'--shape={",".join(numbers)}'
        return super().parse_known_args(joined, namespace)


#: Larger than any image, and the product of two such sides fits 64 bits.
_size = whole_number(1, 2**31 - 1)


def shape_argument(text: str) -> tuple[int, int, int]:
    """``'3,224,224'``, ``'224,224'`` or ``'224'`` as channels, height and width."""
    try:
        numbers = [_size(part) for part in text.replace('x', ',').split(',')]
    except argparse.ArgumentTypeError:
        numbers = []
    if not 1 <= len(numbers) <= 3:
        raise argparse.ArgumentTypeError(
            f'{printable(text, 40)!r} is not a shape: give C,H,W or H,W or one number, as '
            '3,224,224 or 3 224 224'
        )
    size = numbers if len(numbers) == 1 else numbers[-2:]
    channels = numbers[0] if len(numbers) == 3 else 3
    return channels, size[0], size[-1]


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of tools that export a graph; see :func:`export_options`."""
    add = parser.add_argument
    dynamic_help = 'let the graph take any batch size, height and width'
    add('--dynamic', action='store_true', help=dynamic_help)
    add(
        '--opset',
        type=whole_number(1),
        help='version of the ONNX operators; below 18, the exporter based on TorchScript '
        'writes the file (default: 18, or 17 if only that exporter works)',
    )
    shape_help = 'shape C,H,W or C H W of an image (default: from the config)'
    add('--shape', type=shape_argument, help=shape_help)
    rtol_help = 'largest relative L2 error allowed for an fp32 output (default: 1e-4)'
    add('--rtol', type=rtol_argument, default=1e-4, help=rtol_help)
    add('--overwrite', action='store_true', help='replace existing output files')


def export_options(args: argparse.Namespace) -> dict[str, Any]:
    """The values of :func:`add_export_arguments`, and the config's name."""
    names = ('dynamic', 'opset', 'shape', 'rtol', 'overwrite')
    return {name: getattr(args, name) for name in names} | {'source_config': args.config}


def add_runner_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of tools that run a Runner, as in mmpretrain and mmseg."""
    parser.add_argument(
        '--work-dir',
        type=name_argument,
        help='folder for logs and checkpoints (default: from the config, or work_dirs/ and '
        'the name of the config)',
    )
    add_config_options(parser)
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='how the processes of a distributed job are started (default: none)',
    )
    # torch.distributed.launch passes it; torchrun sets the variable itself.
    parser.add_argument(
        '--local_rank',
        '--local-rank',
        type=whole_number(0),
        default=0,
        help='set by torch.distributed.launch',
    )


class _ConfigOptions(DictAction):
    """mmengine's ``DictAction``, with errors that say what is wrong."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Sequence[str],
        option_string: str | None = None,
    ) -> None:
        """Read the options."""
        for text in values:
            try:
                name = re.split('[.=]', text)[0]
                if not name.isidentifier() or keyword.iskeyword(name):
                    # It could not be written into a config.
                    raise ValueError(f'{printable(name, 40)!r} is not a valid name')
                super().__call__(parser, namespace, [text], option_string)
            except Exception as error:
                # The parser may raise anything, as for many nested brackets.
                raise argparse.ArgumentError(
                    self,
                    f'{printable(text, 80)!r} is not an option ({reason(error)}): give '
                    'key=value',
                ) from None


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Add the argument that overrides entries of a config."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=_ConfigOptions,
        help='override entries of the config, as key=value or key="[a,b]"',
    )


def prepare_run(cfg: Config, args: argparse.Namespace) -> None:
    """Apply the values of :func:`add_runner_arguments` to a config.

    Raises:
        UserError: If the launcher did not start this process, or ``work_dir`` or
            ``load_from`` of the config is not a string.
    """
    for name in ('work_dir', 'load_from'):
        if not isinstance(cfg.get(name), str | None):
            raise ConfigError(f'{name} of {args.config} is not a path: give a string')
    variable, remedy = _LAUNCHERS.get(args.launcher, (None, None))
    if variable and variable not in os.environ:
        raise UserError(
            f'--launcher {args.launcher} needs the variable {variable}: {remedy}'
        )
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg.launcher = args.launcher
    if args.launcher == 'none':
        cfg.model = for_one_process(cfg.model)
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs') / Path(args.config).stem)
