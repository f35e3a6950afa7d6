"""Write files whole or not at all."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from mmrep.errors import UserError

try:
    import fcntl
except ImportError:
    # Windows, which replaces no open file: what a killed run left stays there.
    fcntl = None


def out_path(name: str | Path, *suffixes: str) -> Path:
    """The file that a user names for what is to be written; ``~`` is the home folder.

    Args:
        name: What the user gave.
        suffixes: How the name may end. Default: in any way.

    Raises:
        UserError: If it is no name of a file, or ends otherwise.
    """
    text = os.fspath(name)
    if not text or '\0' in text:
        raise UserError(f'{text!r} is no name of a file to write: give one')
    text = os.path.expanduser(text)
    if text.endswith(('/', os.sep)):
        raise UserError(f'{text} is the name of a folder: give the name of a file')
    path = Path(text)
    if suffixes and path.suffix not in suffixes:
        raise UserError(f'{text} must end in {" or ".join(suffixes)}')
    return path


def refuse_existing(*paths: str | Path, overwrite: bool = False) -> None:
    """Raise a ``UserError`` if a path is no file, or a file that must be kept."""
    for path in map(Path, paths):
        with _refusing(path):
            if path.is_dir():
                raise UserError(f'{path} is a folder: give the name of a file')
            if path.exists() and not path.is_file():
                raise UserError(f'{path} is a device or a pipe: give the name of a file')
            if path.exists() and not overwrite:
                raise UserError(f'{path} exists: give another name, or --overwrite')


def refuse_unwritable(path: Path) -> None:
    """Raise a ``UserError`` if no file can be written here, for what is written last.

    Nothing is made, neither the file nor its folders.
    """
    refuse_existing(path, overwrite=True)
    try:
        if path.exists():
            path.open('ab').close()
            return
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        # The rights alone do not tell: nobody can write into /proc.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f'{path} cannot be written ({error.strerror or error}): give another place'
        ) from error


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """:func:`atomic_writes` of one file."""
    with atomic_writes(path) as (temporary,):
        yield temporary


@contextmanager
def atomic_writes(*paths: str | Path) -> Iterator[tuple[Path, ...]]:
    """Temporary files that become ``paths`` if the block ends well, and else go.

    They take their names in the order of ``paths``, when all contents are on the disk. A
    process or a machine that stops leaves of every file the old one or the new one, whole,
    and the new one of a path only after those before it. A temporary file that it leaves,
    too, goes with the next write of the same path.

    Folders are made. A symbolic link stays, and what it points to is written.

    Raises:
        UserError: If the system does not let them be written; then nothing has changed.
    """
    with _refusing(*paths), ExitStack() as stack:
        targets = [Path(os.path.realpath(path)) for path in paths]
        for path in targets:
            _remove_leftovers(path)
        temporaries = [stack.enter_context(_temporary_for(path)) for path in targets]
        yield tuple(temporaries)
        umask = os.umask(0)
        os.umask(umask)
        for path, temporary in zip(targets, temporaries, strict=True):
            # First, since the mode may forbid it.
            _sync(temporary, os.O_RDWR)
            # A temporary file is its owner's alone; the result is like the file that it
            # replaces, or like any other.
            mode = path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~umask
            temporary.chmod(mode)
        _replace(targets, temporaries)


def _replace(targets: Sequence[Path], temporaries: Sequence[Path]) -> None:
    """Give temporary files their names in order; if one cannot have its, none has."""
    with ExitStack() as copies, ExitStack() as undo:
        for target, temporary in zip(targets, temporaries, strict=True):
            last = target is targets[-1]
            if not last:
                before = None
                if target.exists():
                    before = copies.enter_context(_temporary_for(target))
                    shutil.copy2(target, before)
                undo.callback(_restore, target, before)
            os.replace(temporary, target)
            if last:
                undo.pop_all()
            # The name is the folder's contents. Not every system syncs those.
            with suppress(OSError):
                _sync(target.parent, os.O_RDONLY)


def _restore(target: Path, before: Path | None) -> None:
    """What a file was: a copy, or nothing."""
    if before:
        os.replace(before, target)
    else:
        target.unlink(missing_ok=True)


@contextmanager
def _temporary_for(path: Path) -> Iterator[Path]:
    """An empty file beside ``path``, which is removed if it is still there in the end."""
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary, lock = _create_locked(path)
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)
            lock.close()
    finally:
        for folder in made:
            # Those that hold something stay.
            with suppress(OSError):
                folder.rmdir()


def _prefix(path: Path) -> str:
    """What the names of a file's temporary files begin with.

    As short as may be: the file's own name may be as long as names can be.
    """
    return f'.mmrep-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}-'


def _create_locked(path: Path) -> tuple[Path, IO]:
    """A new file beside ``path``, locked until the other result is closed."""
    while True:
        handle, name = tempfile.mkstemp('.tmp', _prefix(path), path.parent)
        lock = os.fdopen(handle)
        if fcntl is None:
            lock.close()
        else:
            # Not every file system has locks.
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
        # Another run may have taken it for a leftover before it was locked.
        if os.path.exists(name):
            return Path(name), lock
        lock.close()


def _remove_leftovers(path: Path) -> None:
    """Remove the temporary files of ``path`` that no running process has locked."""
    for leftover in path.parent.glob(f'{_prefix(path)}*.tmp') if fcntl else ():
        with suppress(OSError):
            handle = os.open(leftover, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                leftover.unlink()
            finally:
                os.close(handle)


@contextmanager
def _refusing(*paths: str | Path) -> Iterator[None]:
    """Turn an error of the system into a ``UserError`` that names the files."""
    try:
        yield
    except OSError as error:
        names = ' and '.join(map(str, paths))
        raise UserError(
            f'{names} cannot be written ({error.strerror or error}): nothing has changed; '
            'give another place, or see to room and rights there'
        ) from error


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
