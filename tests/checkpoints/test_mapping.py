"""Pages of a mapped checkpoint are given back, and nothing else is."""

import ctypes
import itertools
import os
from pathlib import Path

import pytest
import torch
from laws import assert_same
from torch import Tensor

from mmrep.checkpoints import MappedFile, read_checkpoint, release_free_memory

SMAPS = Path('/proc/self/smaps')
MIB = 2**20

pytestmark = pytest.mark.skipif(not SMAPS.is_file(), reason='the system does not tell')


def resident(path: Path) -> int:
    """The bytes of a file that count as this process's memory."""
    lines = SMAPS.read_text().splitlines()
    starts = [i for i, line in enumerate(lines) if line.endswith(f' {path.resolve()}')]
    sizes = (
        next(line for line in itertools.islice(lines, start, None) if line[:4] == 'Rss:')
        for start in starts
    )
    return 1024 * sum(int(line.split()[1]) for line in sizes)


def numbers(count: int, first: int = 0) -> Tensor:
    return torch.arange(first, first + count, dtype=torch.int32)


@pytest.fixture
def write(tmp_path):
    """Write tensors into a file of some name."""

    def write(name: str = 'weights.pth', **tensors: Tensor) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        torch.save(tensors, path)
        return path

    return write


def test_pages_are_given_back_and_read_again(write):
    expected = numbers(16 * MIB)
    path = write(a=expected)
    size = path.stat().st_size
    assert size > 64 * MIB
    weights = read_checkpoint(path)
    assert torch.equal(weights['a'], expected)
    assert resident(path) > 0.9 * size
    mapped = MappedFile(path)
    for _ in range(2):
        mapped.release(weights.values())
        assert resident(path) < 0.1 * size
        assert torch.equal(weights['a'], expected)
        assert resident(path) > 0.9 * size


def test_others_keep_their_pages(write):
    """A tensor of the same file, one of another file and one of none."""
    path, other = write(a=numbers(MIB), b=numbers(MIB, 7)), write('other.pth', c=numbers(9))
    weights, others = read_checkpoint(path), read_checkpoint(other)
    weights['b'] += 1
    others['c'] += 1
    fresh = numbers(4 * MIB)
    fresh += 1
    mapped = MappedFile(path)
    # What was changed would be lost with its pages.
    mapped.release([weights['a'], others['c'], fresh])
    assert torch.equal(weights['b'], numbers(MIB, 8))
    assert torch.equal(others['c'], numbers(9, 1))
    assert torch.equal(fresh, numbers(4 * MIB, 1))
    assert torch.equal(weights['a'], numbers(MIB))
    # And it is, but for the pages at its ends.
    mapped.release([weights['b']])
    assert (weights['b'] == numbers(MIB, 7)).float().mean() > 0.99


@pytest.mark.parametrize('count', [1, 500, 1024, 1500, 5000])
def test_neighbours_on_the_same_page(write, count):
    names = 'abcde'
    path = write(**{name: numbers(count, first) for first, name in enumerate(names)})
    weights = read_checkpoint(path)
    for name in 'bd':
        weights[name] += 100
    MappedFile(path).release([weights[name] for name in 'ace'])
    for first, name in enumerate(names):
        change = 100 if name in 'bd' else 0
        assert torch.equal(weights[name], numbers(count, first + change)), name


def test_views(write):
    path = write(a=numbers(MIB))
    rows = read_checkpoint(path)['a'].reshape(4, -1)
    rows[1] += 1
    expected = rows.clone()
    MappedFile(path).release([rows[0], rows[2], torch.empty(0)])
    assert torch.equal(rows, expected)
    MappedFile(path).release([rows.t()])
    assert (rows == numbers(MIB).reshape(4, -1)).float().mean() > 0.99


@pytest.mark.parametrize(
    'name', ['two words.pth', 'a folder/of two  words.pth', 'späße.pth', 'a(deleted).pth']
)
def test_names(write, name):
    path = write(name, a=numbers(MIB))
    weights = read_checkpoint(path)
    assert torch.equal(weights['a'], numbers(MIB))
    assert resident(path) > 3 * MIB
    MappedFile(path).release(weights.values())
    assert resident(path) < MIB


@pytest.mark.parametrize('way', ['link', 'folder link', 'relative', 'home'])
def test_other_ways_to_the_file(write, tmp_path, monkeypatch, way):
    path = write('folder/weights.pth', a=numbers(MIB))
    (tmp_path / 'link').symlink_to(path)
    (tmp_path / 'folder link').symlink_to(path.parent)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HOME', str(tmp_path))
    source = {
        'link': tmp_path / 'link',
        'folder link': tmp_path / 'folder link' / 'weights.pth',
        'relative': os.path.join('folder', '..', 'folder', 'weights.pth'),
        'home': '~/folder/weights.pth',
    }[way]
    weights = read_checkpoint(source)
    assert torch.equal(weights['a'], numbers(MIB))
    MappedFile(source).release(weights.values())
    assert resident(path) < MIB
    assert torch.equal(weights['a'], numbers(MIB))


@pytest.mark.parametrize('how', ['not mapped', 'not there'])
def test_a_file_that_is_not_mapped(write, tmp_path, how):
    path = write(a=numbers(MIB))
    weights = read_checkpoint(path, mmap=False)
    weights['a'] += 1
    if how == 'not there':
        path.unlink()
    MappedFile(path).release(weights.values())
    assert torch.equal(weights['a'], numbers(MIB, 1))


def test_a_system_that_does_not_tell(write, monkeypatch):
    path = write(a=numbers(MIB))
    weights = read_checkpoint(path)
    weights['a'] += 1
    monkeypatch.setattr(Path, 'is_file', lambda path: False)
    MappedFile(path).release(weights.values())
    assert torch.equal(weights['a'], numbers(MIB, 1))


def test_parameters(write):
    """As modules hold them."""
    path = write(a=torch.rand(MIB))
    weight = torch.nn.Parameter(read_checkpoint(path)['a'])
    expected = weight.detach().clone()
    MappedFile(path).release(torch.nn.ParameterList([weight]).parameters())
    assert resident(path) < MIB
    assert_same(expected, weight, tolerance=0)


def used() -> int:
    """The bytes that count as this process's memory."""
    pages = Path('/proc/self/statm').read_text().split()[1]
    return int(pages) * os.sysconf('SC_PAGESIZE')


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), 'malloc_trim'), reason='not the C library of GNU'
)
def test_what_is_free_is_given_back():
    # Too small for pages of their own; every other one stays, so that none is at the end.
    pieces = [bytearray(b'x' * 100_000) for _ in range(2000)]
    del pieces[::2]
    before = used()
    release_free_memory()
    assert used() < before - 80 * MIB
    assert all(piece.count(b'x') == 100_000 for piece in pieces)
