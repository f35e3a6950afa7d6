"""Run Python programs in new processes, without importing the libraries for each.

A server process imports torch and the hosts once, which takes ten seconds, and is forked
for each program. It does not import mmrep, so that a program can run as where mmrep is not
installed. With ``MMREP_NEW_PROCESSES=1`` each program has a new interpreter, as a user's.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

TESTS = Path(__file__).parent
_LIBRARIES = [
    *('torch', 'mmengine.runner', 'mmcv.cnn', 'mmcv.transforms'),
    *('mmpretrain.apis', 'mmpretrain.datasets', 'mmpretrain.models'),
    *('mmseg.apis', 'mmseg.datasets', 'mmseg.models'),
]
_CONTEXT = multiprocessing.get_context('forkserver')
_CONTEXT.set_forkserver_preload(_LIBRARIES)


def run_python(
    *arguments: Any, cwd: Path | None = None, timeout: float = 300, **env: str
) -> subprocess.CompletedProcess:
    """Run ``python ARGUMENTS``: a file, or ``-c`` and a program; its output is text.

    Args:
        arguments: The file or program, and what it takes.
        cwd: The folder to run in.
        timeout: Seconds after which it is killed, and ``TimeoutExpired`` raised.
        env: Environment variables to add; of those that are read at the start of Python or
            when a library is imported, only ``PYTHONPATH`` takes effect.
    """
    command = [str(argument) for argument in arguments]
    env = dict(os.environ, **env)
    if os.environ.get('MMREP_NEW_PROCESSES'):
        return subprocess.run(
            [sys.executable, *command],
            cwd=cwd,
            env=env,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    with TemporaryDirectory() as folder:
        outputs = [os.path.join(folder, name) for name in ('out', 'err')]
        options = (command, str(cwd or os.getcwd()), env, outputs)
        process = _CONTEXT.Process(target=_become, args=options)
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(command, timeout)
        printed = [Path(output).read_text() for output in outputs]
    return subprocess.CompletedProcess(command, process.exitcode, *printed)


def _become(
    command: list[str], cwd: str, env: Mapping[str, str], outputs: list[str]
) -> None:
    """Run a program in this forked process as Python would run it in a new one."""
    for descriptor, output in enumerate(outputs, start=1):
        os.dup2(os.open(output, os.O_CREAT | os.O_WRONLY), descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    program, *arguments = command
    first = '' if program == '-c' else os.path.dirname(program)
    added = [path for path in env.get('PYTHONPATH', '').split(os.pathsep) if path]
    # In the test's process sys.path has the folders of the tests, too.
    own = [path for path in sys.path if TESTS not in (Path(path), *Path(path).parents)]
    sys.path[:] = [first, *added, *own]
    if program == '-c':
        code, *arguments = arguments
        sys.argv[:] = ['-c', *arguments]
        exec(compile(code, '<string>', 'exec'), dict(__name__='__main__'))
    else:
        sys.argv[:] = [program, *arguments]
        runpy.run_path(program, run_name='__main__')
