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
    # Windows cannot replace an open file, so there are no locks: leftovers stay.
    fcntl = None


def out_path(name: str | Path, *suffixes: str) -> Path:
    """The path of the output file that a user names; ``~`` is the home folder.

    Args:
        name: What the user gave.
        suffixes: The suffixes that are allowed. Default: any.

    Raises:
        UserError: If it is not the name of a file, or has another suffix.
    """
    text = os.fspath(name)
    if not text or '\0' in text:
        raise UserError(f'{text!r} is not the name of a file: give the file to write')
    text = os.path.expanduser(text)
    if text.endswith(('/', os.sep)):
        raise UserError(f'{text} is the name of a folder: give the name of a file')
    path = Path(text)
    if suffixes and path.suffix not in suffixes:
        raise UserError(f'{text} must end in {" or ".join(suffixes)}')
    return path


def refuse_existing(*paths: str | Path, overwrite: bool = False) -> None:
    """Raise ``UserError`` for a folder or device, or an existing file to be kept."""
    for path in map(Path, paths):
        with _refusing(path):
            if path.is_dir():
                raise UserError(f'{path} is a folder: give the name of a file')
            if path.exists() and not path.is_file():
                raise UserError(f'{path} is a device or a pipe: give the name of a file')
            if path.exists() and not overwrite:
                raise UserError(f'{path} exists: give another name, or --overwrite')


def refuse_unwritable(path: Path) -> None:
    """Raise ``UserError`` if a file, which is to be written later, cannot be written.

    Neither the file nor its folders are created.
    """
    refuse_existing(path, overwrite=True)
    try:
        if path.exists():
            path.open('ab').close()
            return
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        # Permissions are not enough: nobody can create a file in /proc.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f'{path} cannot be written ({error.strerror or error}): give another path'
        ) from error


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Write one file; see :func:`atomic_writes`."""
    with atomic_writes(path) as (temporary,):
        yield temporary


@contextmanager
def atomic_writes(*paths: str | Path) -> Iterator[tuple[Path, ...]]:
    """Yield temporary files that replace ``paths`` if the block succeeds.

    If it fails, they are deleted. They are renamed in the order of ``paths``, once all
    contents are on the disk. If the process or the machine stops, each path holds its old
    or its new file, complete, and a new one only if all paths before it have theirs.
    Temporary files left behind are deleted by the next write of the same path.

    Missing folders are created. A symbolic link stays, and its target is replaced.

    Raises:
        UserError: If the files cannot be written; then nothing has changed.
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
            # Before chmod, since the mode may forbid opening the file.
            _sync(temporary, os.O_RDWR)
            # Only its owner may read a temporary file. The result has the mode of the file
            # that it replaces, or the default mode.
            mode = path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~umask
            temporary.chmod(mode)
        _replace(targets, temporaries)


def _replace(targets: Sequence[Path], temporaries: Sequence[Path]) -> None:
    """Rename temporary files to their targets in order; if one fails, undo all."""
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
            # The name is stored in the folder. Not every system can sync folders.
            with suppress(OSError):
                _sync(target.parent, os.O_RDONLY)


def _restore(target: Path, before: Path | None) -> None:
    """Put the copy of an old file back, or delete a file that was new."""
    if before:
        os.replace(before, target)
    else:
        target.unlink(missing_ok=True)


@contextmanager
def _temporary_for(path: Path) -> Iterator[Path]:
    """Yield an empty file beside ``path``, deleted at the end if it still exists."""
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
            # Folders that are not empty stay.
            with suppress(OSError):
                folder.rmdir()


def _prefix(path: Path) -> str:
    """The prefix of the names of a file's temporary files.

    It is a short hash, since the file's own name may already have the maximum length.
    """
    return f'.mmrep-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}-'


def _create_locked(path: Path) -> tuple[Path, IO]:
    """Create a file beside ``path``, locked until the returned handle is closed."""
    while True:
        handle, name = tempfile.mkstemp('.tmp', _prefix(path), path.parent)
        lock = os.fdopen(handle)
        if fcntl is None:
            lock.close()
        else:
            # Not every file system has locks.
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
        # Another run may have removed it as a leftover before it was locked.
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
            'give another path, or check the free space and permissions there'
        ) from error


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
