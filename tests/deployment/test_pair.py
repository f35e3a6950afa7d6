"""A deploy checkpoint and its config are of one run, or are refused together."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from mmengine.config import Config

from mmrep.checkpoints import read_checkpoint, sha256_of, write_checkpoint
from mmrep.deployment.pair import check_pair, write_pair
from mmrep.errors import CheckpointError, UserError

#: What says that a checkpoint is fused and verified.
VERIFIED = dict(mmrep=dict(source_config='net.py'))


class Files(NamedTuple):
    """The contents of a config and a checkpoint; None for no file."""

    config: bytes | None
    checkpoint: bytes | None

    @classmethod
    def of(cls, folder: Path) -> 'Files':
        return cls(*(read(folder / name) for name in ('deploy.py', 'deploy.pth')))


def read(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def write(folder: Path, value: float, name: str = 'deploy.pth', source: str = 'net.py'):
    """Write a pair whose halves both know a value."""
    out = folder / name
    weights = {'w': torch.full((4000,), float(value))}
    write_pair(out, out.with_suffix('.py'), weights, VERIFIED, f'value = {value}\n', source)


def check(config: Path, checkpoint: Path) -> None:
    """What the tools do."""
    check_pair(Config.fromfile(config), config, checkpoint, read_checkpoint(checkpoint))


def write_others(folder: Path) -> None:
    """Files of the same names that know nothing of one another."""
    (folder / 'deploy.py').write_text('value = 0\n')
    write_checkpoint(folder / 'deploy.pth', {'w': torch.zeros(4000)}, {})


BEFORE = {
    'a pair': lambda folder: write(folder, 0),
    'no pair': write_others,
    'nothing': lambda folder: None,
}


def run_in_child(function: Callable[[], None], kill_after: float | None = None) -> bool:
    """Whether a copy of this process was killed while it ran a function."""
    started, start = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            os.write(start, b'.')
            function()
            status = 0
        finally:
            os._exit(status)
    if kill_after is not None:
        os.read(started, 1)
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(started)
    os.close(start)
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL


def write_until(folder: Path, step: int) -> None:
    """Write, and die at a step; one is before and one is after each call of two kinds."""
    steps = iter(range(step + 1))

    def dying(function: Callable) -> Callable:
        def call(*arguments):
            die(next(steps))
            function(*arguments)
            die(next(steps))

        return call

    def die(now: int) -> None:
        if now == step:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace, os.fsync = dying(os.replace), dying(os.fsync)
    write(folder, 1)


class Killed:
    """A folder in which writers are killed, and what must be true of it then."""

    def __init__(self, folder: Path, before: str) -> None:
        self.folder = folder
        write(folder, 1)
        self.new = Files.of(folder)
        self.clear()
        BEFORE[before](folder)
        self.old = Files.of(folder)
        self.kills = self.halves = 0

    def clear(self) -> None:
        for path in self.folder.iterdir():
            path.unlink()

    def restore(self) -> None:
        self.clear()
        for name, content in zip(('deploy.py', 'deploy.pth'), self.old, strict=True):
            if content is not None:
                (self.folder / name).write_bytes(content)

    def attempt(
        self, function: Callable[[], None], kill_after: float | None = None
    ) -> None:
        """Kill a writer, look at what it left, and write once more."""
        self.kills += run_in_child(function, kill_after)
        found = Files.of(self.folder)
        assert found.config in (self.old.config, self.new.config)
        assert found.checkpoint in (self.old.checkpoint, self.new.checkpoint)
        paths = self.folder / 'deploy.py', self.folder / 'deploy.pth'
        if found not in (self.old, self.new):
            self.halves += 1
            assert found == (self.new.config, self.old.checkpoint)
            with pytest.raises(CheckpointError, match=r'was not written|not exist'):
                check(*paths)
        elif found.checkpoint:
            check(*paths)
        write(self.folder, 1)
        assert sorted(os.listdir(self.folder)) == ['deploy.pth', 'deploy.py']
        assert Files.of(self.folder) == self.new
        self.restore()


@pytest.mark.parametrize('before', BEFORE)
def test_killed_within_the_renaming(tmp_path, before, tally):
    killed = Killed(tmp_path, before)
    # Two contents and their names, each with its folder: six calls.
    for step in range(12):
        killed.attempt(lambda step=step: write_until(tmp_path, step))
    assert killed.kills == 12
    # After the config has its name and before the checkpoint has.
    assert killed.halves == 4
    tally('kills', killed.kills)


def test_killed_at_any_time(tmp_path, tally):
    killed = Killed(tmp_path, 'a pair')
    chance = random.Random(0)
    start = time.perf_counter()
    write(tmp_path, 1)
    longest = time.perf_counter() - start
    killed.restore()
    while killed.kills < 26:
        killed.attempt(lambda: write(tmp_path, 1), chance.uniform(0, longest))
    tally('kills', killed.kills)


class TestCheckPair:
    @pytest.fixture
    def folder(self, tmp_path) -> Path:
        write(tmp_path, 1)
        return tmp_path

    def refused(self, config: Path, checkpoint: Path) -> None:
        sentence = (
            f'{config} was not written together with {checkpoint}: fuse again, or use '
            'them anyway with --cfg-options fused_checkpoint=None'
        )
        with pytest.raises(CheckpointError) as info:
            check(config, checkpoint)
        assert str(info.value) == sentence

    def test_a_pair_under_other_names(self, folder, tmp_path):
        config = (folder / 'deploy.py').rename(tmp_path / 'a.py')
        checkpoint = (folder / 'deploy.pth').rename(tmp_path / 'b.pth')
        check(config, checkpoint)

    @pytest.mark.parametrize('name', ['deploy.pth', 'other.pth'])
    def test_another_verified_checkpoint(self, folder, name):
        write_checkpoint(folder / name, {'w': torch.zeros(1)}, VERIFIED)
        self.refused(folder / 'deploy.py', folder / name)

    def test_one_bit(self, folder):
        path = folder / 'deploy.pth'
        checkpoint = read_checkpoint(path, mmap=False)
        content = bytearray(path.read_bytes())
        # In the middle of the weights. The reader may notice it, too.
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        config = Config.fromfile(folder / 'deploy.py')
        with pytest.raises(CheckpointError, match='was not written together with'):
            check_pair(config, folder / 'deploy.py', path, checkpoint)

    @pytest.mark.parametrize(
        'checkpoint',
        [
            {'w': torch.zeros(1)},
            dict(state_dict={'w': torch.zeros(1)}, meta=dict(epoch=3)),
            dict(
                state_dict={'w': torch.zeros(1)}, meta=dict(mmrep=dict(source_layout='a'))
            ),
        ],
        ids=['bare', 'trained further', 'imported'],
    )
    def test_weights_that_are_no_half_of_a_pair(self, folder, checkpoint):
        torch.save(checkpoint, folder / 'epoch_3.pth')
        check(folder / 'deploy.py', folder / 'epoch_3.pth')
        # What stands where the other half should is asked for.
        torch.save(checkpoint, folder / 'deploy.pth')
        self.refused(folder / 'deploy.py', folder / 'deploy.pth')

    @pytest.mark.parametrize(
        'entry', ['', 'fused_checkpoint = None', 'fused_checkpoint = 1']
    )
    def test_config_that_knows_no_checkpoint(self, folder, entry):
        config = folder / 'deploy.py'
        config.write_text(entry)
        check(config, folder / 'deploy.pth')

    def test_the_hash_is_the_files(self, folder):
        pair = Config.fromfile(folder / 'deploy.py').fused_checkpoint
        assert pair == dict(file='deploy.pth', sha256=sha256_of(folder / 'deploy.pth'))

    def test_home(self, folder, monkeypatch):
        monkeypatch.setenv('HOME', str(folder))
        config = Config.fromfile(folder / 'deploy.py')
        checkpoint = read_checkpoint(folder / 'deploy.pth')
        check_pair(config, '~/deploy.py', '~/deploy.pth', checkpoint)


class TestRefusedName:
    """If one of two files cannot have its name, neither has."""

    @pytest.mark.parametrize('before', BEFORE)
    @pytest.mark.parametrize('last', [1, 2])
    def test_nothing_changes(self, tmp_path, monkeypatch, before, last):
        BEFORE[before](tmp_path)
        old = Files.of(tmp_path)
        calls = []
        replace = os.replace

        def refuse(*arguments):
            calls.append(arguments)
            if len(calls) == last:
                raise OSError(16, 'Device or resource busy', *arguments)
            replace(*arguments)

        monkeypatch.setattr(os, 'replace', refuse)
        with pytest.raises(
            UserError, match=r'deploy\.pth cannot be written \(Device or res'
        ):
            write(tmp_path, 1)
        assert Files.of(tmp_path) == old
        assert len(os.listdir(tmp_path)) == sum(content is not None for content in old)


@pytest.mark.parametrize(
    'name',
    [
        'a\nb.pth',
        'a\udcff.pth',
        'a\'"b.pth',
        'a{0}\\.pth',
        '{{ fileBasename }}\n.pth',
        'ä.pth',
    ],
)
def test_names_are_no_code(tmp_path, name):
    write(tmp_path, 1, name, source=name)
    config = Config.fromfile((tmp_path / name).with_suffix('.py'))
    assert config.fused_checkpoint.file == name
    assert config.keys() == {'value', 'fused_checkpoint'}
