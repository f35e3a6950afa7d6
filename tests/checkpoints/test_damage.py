"""Damage is noticed: what is read is what was written, or nothing is."""

import random
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from safetensors.torch import save_file

from mmrep.checkpoints import read_checkpoint, reading
from mmrep.checkpoints.archive import Archive
from mmrep.checkpoints.refusals import Refusal
from mmrep.errors import CheckpointError

FLIPS = 250


def contents() -> dict:
    generator = torch.Generator().manual_seed(0)
    state = {f'{i}.weight': torch.randn(7, 5, generator=generator) for i in range(6)}
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    return {
        'state_dict': state,
        'meta': {'CLASSES': ('cat', 'dog'), 'seed': np.arange(9), 'epoch': 3},
        'message_hub': {'log_scalars': {'loss': history}},
    }


def same(one: object, other: object) -> bool:
    """Whether two values are one and the same, bit by bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        one, other = one.detach().contiguous(), other.detach().contiguous()
        return one.dtype == other.dtype and np.array_equal(one.numpy(), other.numpy())
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, HistoryBuffer):
        return same(vars(one), vars(other))
    return one == other


@pytest.mark.parametrize('mmap', [True, False], ids=['mmap', 'read'])
def test_bit_flips(tmp_path: Path, mmap: bool, tally: Callable) -> None:
    """Every flip is refused, or is where nothing is."""
    path = tmp_path / 'a.pth'
    torch.save(contents(), path)
    whole, rng = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(FLIPS):
        at, data = rng.randrange(8 * len(whole)), bytearray(whole)
        data[at // 8] ^= 1 << at % 8
        path.write_bytes(data)
        try:
            assert same(read_checkpoint(path, mmap=mmap), contents()), at
        except CheckpointError:
            refused += 1
    tally('bit flips', FLIPS)
    assert refused > FLIPS / 4


def test_every_bit_of_the_bytes(tmp_path: Path, tally: Callable) -> None:
    """Of a weight, and of what says where it is."""
    path = tmp_path / 'a.pth'
    weight = torch.tensor([1.5, -2.25, 3.125])
    torch.save({'w': weight}, path)
    whole = path.read_bytes()
    start = whole.index(weight.numpy().tobytes())
    for bit in range(8 * 12):
        data = bytearray(whole)
        data[start + bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match='do not match its checksum'):
            read_checkpoint(path)
    tally('bit flips', 8 * 12)


@pytest.mark.parametrize('legacy', [False, True], ids=['zip', 'legacy'])
def test_truncations(tmp_path: Path, legacy: bool) -> None:
    path = tmp_path / 'a.pth'
    torch.save(contents(), path, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    for size in {*range(0, len(whole), 97), *range(len(whole) - 120, len(whole))}:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match='it may be cut short'):
            read_checkpoint(path)


@pytest.mark.parametrize('mmap', [True, False], ids=['mmap', 'read'])
def test_without_checksums(tmp_path: Path, mmap: bool) -> None:
    """As torch writes files when it is told to; see ``set_crc32_options``."""
    serialization = torch.serialization
    if not hasattr(serialization, 'set_crc32_options'):
        pytest.skip('this torch always writes them')
    path = tmp_path / 'a.pth'
    computes = serialization.get_crc32_options()
    serialization.set_crc32_options(False)
    try:
        torch.save(contents(), path)
    finally:
        serialization.set_crc32_options(computes)
    assert same(read_checkpoint(path, mmap=mmap), contents())


def test_what_is_not_used_is_verified_as_well(tmp_path: Path) -> None:
    path = tmp_path / 'a.pth'
    torch.save({'w': torch.arange(5.0)}, path)
    data = bytearray(path.read_bytes())
    data[data.rindex(b'a/version') - 46 + 16] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r'a/version.* do not match its checksum'):
        read_checkpoint(path)


def test_one_missing_checksum_is_a_wrong_one(tmp_path: Path) -> None:
    path = tmp_path / 'a.pth'
    torch.save({'w': torch.arange(5.0)}, path)
    data = bytearray(path.read_bytes())
    at = data.rindex(b'a/data/0') - 46 + 16
    data[at : at + 4] = bytes(4)
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match='do not match its checksum'):
        read_checkpoint(path)


def repack(path: Path, changes: dict | None = None, **options: bool) -> None:
    """Write an archive anew with another packer.

    Args:
        path: The archive.
        changes: Other contents of entries, and ``None`` for those to leave out.
        options: Of the packer.
    """
    with zipfile.ZipFile(path) as source:
        entries = {name: source.read(name) for name in source.namelist()}
    entries |= changes or {}
    entries = {name: content for name, content in entries.items() if content is not None}
    with zipfile.ZipFile(path, 'w') as target:
        for name, content in entries.items():
            with target.open(name, 'w', **options) as file:
                file.write(content)


def test_unaligned_storages_are_read(tmp_path: Path) -> None:
    """As other packers leave them; a map of them would be slow, or crash."""
    path = tmp_path / 'a.pth'
    torch.save({'w': torch.arange(5.0), 'v': torch.arange(3.0)}, path)
    repack(path)
    at = path.read_bytes().index(torch.arange(5.0).numpy().tobytes())
    assert at % 16, 'as is the point of this test'
    read = read_checkpoint(path)
    assert torch.equal(read['w'], torch.arange(5.0))
    assert all(tensor.data_ptr() % 16 == 0 for tensor in read.values())


def test_large_archives(tmp_path: Path) -> None:
    """Sizes of more than 32 bits stand elsewhere."""
    path = tmp_path / 'a.pth'
    torch.save({'w': torch.arange(5.0)}, path)
    repack(path, force_zip64=True)
    assert torch.equal(read_checkpoint(path)['w'], torch.arange(5.0))


@pytest.mark.parametrize('mmap', [True, False], ids=['mmap', 'read'])
def test_order_of_bytes(tmp_path: Path, mmap: bool) -> None:
    """Of a machine with the other order, and of a torch that does not say."""
    path, weight = tmp_path / 'a.pth', torch.arange(5.0)
    torch.save({'w': weight}, path)
    repack(path, {'a/byteorder': None})
    assert torch.equal(read_checkpoint(path, mmap=mmap)['w'], weight)
    turned = weight.numpy().astype('>f4').tobytes()
    repack(path, {'a/byteorder': b'big', 'a/data/0': turned})
    assert torch.equal(read_checkpoint(path, mmap=mmap)['w'], weight)


def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / 'a.pth'
    torch.save({'w': torch.zeros(1 << 18)}, path)
    with open(path, 'rb', buffering=0) as file:
        archive = Archive(file, path.stat().st_size)
        path.write_bytes(path.read_bytes()[:2000])
        with pytest.raises(Refusal, match='it became shorter while it was read'):
            archive.verify('a/data/0')


def test_too_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / 'a.pth'
    torch.save({}, path)

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(reading, '_read_zip', fail)
    with pytest.raises(CheckpointError, match='needs more memory to read than there is'):
        read_checkpoint(path)


def test_thousands_of_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / 'a.safetensors'
    save_file({'a': torch.ones(1), 'b': torch.ones(1)}, path)
    monkeypatch.setattr(reading, '_MOST_TENSORS', 2)
    assert len(read_checkpoint(path)['state_dict']) == 2
    monkeypatch.setattr(reading, '_MOST_TENSORS', 1)
    with pytest.raises(CheckpointError, match='holds 2 tensors, which no training writes'):
        read_checkpoint(path)
