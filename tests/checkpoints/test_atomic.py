import errno
import fcntl
import os
import shutil
from pathlib import Path

import pytest

from mmrep.checkpoints import atomic_write, atomic_writes, out_path, refuse_existing
from mmrep.errors import UserError


class TestAtomicWrite:
    def test_whole(self, tmp_path):
        path = tmp_path / 'new' / 'folder' / 'a.txt'
        with atomic_write(path) as temporary:
            temporary.write_text('new')
            assert not path.exists()
        assert path.read_text() == 'new'
        assert os.listdir(path.parent) == ['a.txt']

    @pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt])
    @pytest.mark.parametrize('old', [None, 'old'])
    def test_not_at_all(self, tmp_path, error, old):
        path = tmp_path / 'a.txt'
        if old:
            path.write_text(old)
        with pytest.raises(error), atomic_write(path) as temporary:
            temporary.write_text('half of')
            raise error
        assert os.listdir(tmp_path) == (['a.txt'] if old else [])
        assert not old or path.read_text() == old

    def test_it_is_on_the_disk_before_it_takes_its_name(self, tmp_path, monkeypatch):
        path = tmp_path / 'a.txt'
        synced = []

        def fsync(handle: int) -> None:
            synced.append((os.fstat(handle).st_ino, path.exists()))

        monkeypatch.setattr(os, 'fsync', fsync)
        with atomic_write(path) as temporary:
            temporary.write_text('new')
        # The file while it has no name yet, and then the folder that holds the name.
        assert synced == [(path.stat().st_ino, False), (tmp_path.stat().st_ino, True)]

    @pytest.mark.parametrize('umask', [0o022, 0o077])
    def test_mode_is_that_of_any_file(self, tmp_path, umask):
        before = os.umask(umask)
        try:
            with atomic_write(tmp_path / 'a.txt'):
                pass
            assert os.umask(umask) == umask
        finally:
            os.umask(before)
        assert (tmp_path / 'a.txt').stat().st_mode & 0o777 == 0o666 & ~umask

    @pytest.mark.parametrize('mode', [0o600, 0o664, 0o444])
    def test_mode_of_a_file_that_is_replaced_stays(self, tmp_path, mode):
        path = tmp_path / 'a.txt'
        path.touch()
        path.chmod(mode)
        with atomic_write(path) as temporary:
            temporary.write_text('new')
        assert path.read_text() == 'new'
        assert path.stat().st_mode & 0o777 == mode

    def test_full_disk(self, tmp_path):
        path = tmp_path / 'a.txt'
        path.write_text('old')
        with (
            pytest.raises(UserError, match=r'a\.txt cannot be written \(No space left on'),
            atomic_write(path) as temporary,
        ):
            temporary.unlink()
            temporary.symlink_to('/dev/full')
            temporary.write_text('new')
        assert os.listdir(tmp_path) == ['a.txt'] and path.read_text() == 'old'

    @pytest.mark.parametrize('call', ['fsync', 'replace'])
    def test_failure_at_the_end(self, tmp_path, monkeypatch, call):
        def fail(*arguments):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        path = tmp_path / 'new' / 'a.txt'
        monkeypatch.setattr(os, call, fail)
        with (
            pytest.raises(UserError, match=r'cannot be written \(Input/output error\)'),
            atomic_write(path),
        ):
            pass
        assert not os.listdir(tmp_path)

    def test_folder_that_cannot_be_synced(self, tmp_path, monkeypatch):
        """Some network file systems refuse it, when the file has its name already."""
        fsync = os.fsync

        def of_files(handle: int) -> None:
            if os.path.isdir(f'/proc/self/fd/{handle}'):
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            fsync(handle)

        monkeypatch.setattr(os, 'fsync', of_files)
        with atomic_write(tmp_path / 'a.txt') as temporary:
            temporary.write_text('new')
        assert (tmp_path / 'a.txt').read_text() == 'new'

    def test_folders_that_were_made_go_with_the_file(self, tmp_path):
        with (
            pytest.raises(ValueError),
            atomic_writes(tmp_path / 'a' / 'b' / 'c.txt', tmp_path / 'a' / 'd.txt'),
        ):
            assert (tmp_path / 'a' / 'b').is_dir()
            raise ValueError
        assert not os.listdir(tmp_path)


class TestAtomicWrites:
    def test_none_has_its_name_before_all_are_on_the_disk(self, tmp_path, monkeypatch):
        paths = [tmp_path / 'a', tmp_path / 'b' / 'c']
        seen = []
        fsync = os.fsync

        def count(handle: int) -> None:
            seen.append([path.exists() for path in paths])
            fsync(handle)

        monkeypatch.setattr(os, 'fsync', count)
        with atomic_writes(*paths) as temporaries:
            for number, temporary in enumerate(temporaries):
                temporary.write_text(str(number))
        assert [path.read_text() for path in paths] == ['0', '1']
        none, first, both = [False, False], [True, False], [True, True]
        assert seen == [none, none, first, both]

    @pytest.mark.parametrize('error', [KeyboardInterrupt, SystemExit, OSError])
    @pytest.mark.parametrize('old', [True, False])
    @pytest.mark.parametrize(
        ('number', 'done'), [(1, False), (1, True), (2, False), (2, True), (3, False)]
    )
    def test_stopped_between_names(self, tmp_path, monkeypatch, error, number, old, done):
        """As by a signal, before a file has its name or when it just has."""
        paths = [tmp_path / name for name in 'abc']
        for path in paths if old else ():
            path.write_text('old')
        replace, calls = os.replace, []

        def stop(source: Path, target: Path) -> None:
            calls.append(target)
            if done or len(calls) != number:
                replace(source, target)
            if len(calls) == number:
                raise error

        monkeypatch.setattr(os, 'replace', stop)
        with (
            pytest.raises(UserError if error is OSError else error),
            atomic_writes(*paths) as temporaries,
        ):
            for temporary in temporaries:
                temporary.write_text('new')
        assert [path.read_text() for path in paths if path.exists()] == ['old'] * old * 3
        assert len(os.listdir(tmp_path)) == old * 3


class TestLeftovers:
    """Temporary files that a killed process left; test_pair.py kills some."""

    def leave(self, path: Path) -> Path:
        """A copy of a temporary file, which nobody has locked."""
        with atomic_write(path) as temporary:
            temporary.write_text('half of')
            left = temporary.with_name(f'{temporary.stem[:-8]}leftover.tmp')
            shutil.copy(temporary, left)
        return left

    def test_they_go(self, tmp_path):
        left = self.leave(tmp_path / 'a.txt')
        assert left.exists()
        with atomic_write(tmp_path / 'a.txt'):
            assert not left.exists()
        assert os.listdir(tmp_path) == ['a.txt']

    def test_those_of_a_process_that_runs_stay(self, tmp_path):
        with atomic_write(tmp_path / 'a.txt') as first:
            first.write_text('first')
            with atomic_write(tmp_path / 'a.txt') as second:
                second.write_text('second')
                assert first.exists()
            assert (tmp_path / 'a.txt').read_text() == 'second'
        assert (tmp_path / 'a.txt').read_text() == 'first'

    def test_those_of_other_files_stay(self, tmp_path):
        left = self.leave(tmp_path / 'a.txt')
        foreign = [tmp_path / '.a.txt-leftover.tmp', tmp_path / '.a-leftover.txt']
        for path in foreign:
            path.write_text('precious')
        with atomic_write(tmp_path / 'b.txt'):
            pass
        names = {path.name for path in (left, *foreign)} | {'a.txt', 'b.txt'}
        assert set(os.listdir(tmp_path)) == names

    def test_links_stay(self, tmp_path):
        left = self.leave(tmp_path / 'a.txt')
        left.unlink()
        left.symlink_to('precious')
        (tmp_path / 'precious').write_text('precious')
        with atomic_write(tmp_path / 'a.txt'):
            pass
        assert left.is_symlink() and (tmp_path / 'precious').read_text() == 'precious'

    def test_one_that_another_run_removes_before_it_is_locked(self, tmp_path, monkeypatch):
        flock, removed = fcntl.flock, []

        def late(file, operation: int) -> None:
            if not removed:
                (path,) = tmp_path.iterdir()
                path.unlink()
                removed.append(path)
            flock(file, operation)

        monkeypatch.setattr(fcntl, 'flock', late)
        with atomic_write(tmp_path / 'a.txt') as temporary:
            assert removed and temporary.exists()

    def test_no_locks(self, tmp_path, monkeypatch):
        """Then nobody knows who is at work, and nothing is removed."""
        left = self.leave(tmp_path / 'a.txt')

        def flock(*arguments):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr(fcntl, 'flock', flock)
        with atomic_write(tmp_path / 'a.txt') as temporary:
            temporary.write_text('new')
        assert left.exists() and (tmp_path / 'a.txt').read_text() == 'new'

    def test_system_without_locks(self, tmp_path, monkeypatch):
        monkeypatch.setattr('mmrep.checkpoints.atomic.fcntl', None)
        left = self.leave(tmp_path / 'a.txt')
        with atomic_write(tmp_path / 'a.txt') as temporary:
            temporary.write_text('new')
        assert left.exists() and (tmp_path / 'a.txt').read_text() == 'new'


class TestLinks:
    """A symbolic link stays; what it points to is written, or replaced whole."""

    @pytest.mark.parametrize('old', [None, 'old'])
    def test_to_a_file(self, tmp_path, old):
        link, target = tmp_path / 'link', tmp_path / 'disk' / 'file'
        link.symlink_to('disk/file')
        if old:
            target.parent.mkdir()
            target.write_text(old)
        with atomic_write(link) as temporary:
            # Else the two could be on different file systems.
            assert temporary.parent == target.parent
            temporary.write_text('new')
        assert os.readlink(link) == 'disk/file'
        assert target.read_text() == 'new' and not target.is_symlink()
        assert os.listdir(target.parent) == ['file']

    def test_circle(self, tmp_path):
        link = tmp_path / 'link'
        link.symlink_to('link')
        refuse_existing(link)
        with atomic_write(link) as temporary:
            temporary.write_text('new')
        assert link.read_text() == 'new'


@pytest.fixture
def unprivileged():
    """The user who runs the tests may be root, whom nothing is forbidden."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield
    os.seteuid(user)


@pytest.fixture
def refused():
    """Neither the check before the work nor the write itself lets a path pass."""

    def refused(path: str | Path, match: str) -> None:
        for overwrite in (False, True):
            with pytest.raises(UserError, match=match) as info:
                refuse_existing(path, overwrite=overwrite)
                with atomic_write(path) as temporary:
                    temporary.write_text('new')
            assert '\n' not in str(info.value)

    return refused


class TestPlaces:
    def test_no_permission(self, tmp_path, unprivileged, refused):
        refused(tmp_path / 'closed' / 'a.txt', r'a\.txt cannot be written \(Permission den')

    @pytest.mark.parametrize('name', ['/proc/x.txt', '/proc/self/x.txt', '/sys/x.txt'])
    def test_no_disk(self, refused, name):
        refused(name, f'{name} cannot be written ')

    @pytest.mark.parametrize('name', ['/dev/full', '/dev/null', '/dev/tty'])
    def test_devices(self, refused, name):
        """A file that is renamed to one would replace it for all programs."""
        refused(name, f'{name} is a device or a pipe: give the name of a file')

    def test_pipe(self, tmp_path, refused):
        os.mkfifo(tmp_path / 'pipe')
        refused(tmp_path / 'pipe', 'pipe is a device or a pipe: give the name of a file')

    def test_folder(self, tmp_path, refused):
        refused(tmp_path, 'is a folder: give the name of a file')

    def test_file_for_a_folder(self, tmp_path, refused):
        (tmp_path / 'file').write_text('precious')
        refused(
            tmp_path / 'file' / 'a.txt', r'cannot be written \((Not a directory|File exi)'
        )
        assert (tmp_path / 'file').read_text() == 'precious'

    def test_name_that_is_too_long(self, tmp_path, refused):
        refused(tmp_path / f'{"a" * 252}.txt', r'cannot be written \(File name too long\)')
        refused(tmp_path / ('a/' * 2100), r'cannot be written \(File name too long\)')

    @pytest.mark.parametrize(
        'name',
        [
            'a' * 251 + '.txt',
            'a\nb',
            'a\udcffb',
            '[red]a[bold]',
            '*?[a]',
            '-',
            '~',
            '\'"',
            ' ',
        ],
        ids=ascii,
    )
    def test_names_that_are_right(self, tmp_path, name):
        path = tmp_path / name
        for text in ('old', 'new'):
            with atomic_write(path) as temporary:
                temporary.write_text(text)
            assert path.read_text() == text
        assert os.listdir(tmp_path) == [name]


class TestOutPath:
    def test_home(self, monkeypatch):
        monkeypatch.setenv('HOME', '/mine')
        assert out_path('~/a.pth') == Path('/mine/a.pth')
        assert out_path(Path('~/a.pth')) == Path('/mine/a.pth')
        assert out_path('~~/a.pth') == Path('~~/a.pth')

    def test_suffixes(self):
        assert out_path('a.b', '.c', '.b') == Path('a.b')
        for name in ('a', '.b', 'a.b.c', 'a.B'):
            with pytest.raises(UserError, match=rf'^{name} must end in \.d or \.b$'):
                out_path(name, '.d', '.b')

    @pytest.mark.parametrize('name', ['', 'a\0.pth', '\0', '~\0/a.pth'])
    def test_no_names(self, name):
        with pytest.raises(UserError, match='is not the name of a file: give the file to'):
            out_path(name, '.pth')

    @pytest.mark.parametrize('name', ['a.pth/', '/', './', '~/'])
    def test_names_of_folders(self, name):
        with pytest.raises(UserError, match='is the name of a folder: give the name of a'):
            out_path(name)


def test_refuse_existing(tmp_path):
    path = tmp_path / 'a.pth'
    refuse_existing(path, tmp_path / 'no' / 'folder.pth')
    path.touch()
    with pytest.raises(UserError, match=r'a\.pth exists: .* --overwrite'):
        refuse_existing(tmp_path / 'b.pth', path)
    refuse_existing(path, overwrite=True)
    with pytest.raises(UserError, match='is a folder'):
        refuse_existing(tmp_path, overwrite=True)
