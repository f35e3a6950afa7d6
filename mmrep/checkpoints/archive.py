"""Read the zip archive of a checkpoint, and verify it before any of it is used.

torch itself only looks up where an entry begins: it maps compressed bytes as weights, and
compares no checksum. Here an archive is read only if it is as ``torch.save`` or another
writer of plain zip files makes it: its entries are stored without compression, follow each
other from the first byte on and have different names, and the directory at the end agrees
with the header in front of each entry. Such a file can be read in one way only.
Format: PKWARE's APPNOTE.TXT 6.3.
"""

import struct
import zlib
from collections.abc import Iterator
from io import FileIO
from typing import NamedTuple

from .refusals import Refusal, damaged, excessive

#: The first bytes of every archive.
SIGNATURE = b'PK\x03\x04'

_LOCAL = struct.Struct('<4s5H3L2H')
_CENTRAL = struct.Struct('<4s6H3L5H2L')
_END = struct.Struct('<4s4H2LH')
_END_64 = struct.Struct('<4sQ2H2L4Q')
_LOCATOR_64 = struct.Struct('<4sLQL')

#: Value of a 32-bit field whose real value is in a 64-bit field.
_WIDE = 0xFFFFFFFF

_ENCRYPTED, _SIZES_FOLLOW, _UTF_8 = 0x1, 0x8, 0x800

#: Limits: a hundred times what the largest training needs.
_MOST_ENTRIES, _LARGEST_DIRECTORY = 1 << 18, 1 << 26

#: Bytes per read, few enough to be in the cache when their checksum is computed.
_CHUNK = 1 << 19


class Entry(NamedTuple):
    """The place of an entry in the file.

    Args:
        offset: Offset of its header.
        start: Offset of its data.
        size: Size of its data in bytes.
        crc: CRC-32 of its data.
    """

    offset: int
    start: int
    size: int
    crc: int


class Archive:
    """The entries of a zip file.

    Args:
        file: The file, opened without a buffer.
        size: Its size in bytes.

    Raises:
        Refusal: If the file is not an archive as described for this module.
    """

    def __init__(self, file: FileIO, size: int) -> None:
        self._file = file
        self._size = size
        self.entries: dict[str, Entry] = {}
        offset, directory, count = self._find_directory()
        if b'/constants.pkl' in directory:
            raise Refusal(
                'is a TorchScript program, not a checkpoint',
                'give the file that training wrote',
            )
        for name, entry in self._walk(directory, offset, count):
            if name in self.entries:
                raise damaged(f'its archive has two entries {name!r}')
            self.entries[name] = entry
        end = 0
        ordered = sorted(self.entries.items(), key=lambda item: item[1].offset)
        if ordered and ordered[0][1].offset:
            raise damaged('something stands before its archive')
        for name, entry in [*ordered, ('the directory', Entry(offset, offset, 0, 0))]:
            if entry.offset < end:
                raise damaged(f'{name!r} overlaps another entry of its archive')
            end = entry.start + entry.size
        # After torch.serialization.set_crc32_options(False), all are 0.
        self._has_crc = any(entry.crc for entry in self.entries.values())
        self._unverified = set(self.entries)

    def read(self, name: str) -> bytearray:
        """Read and verify an entry."""
        content = bytearray(self.entries[name].size)
        self.read_into(name, memoryview(content))
        return content

    def read_into(self, name: str, target: memoryview) -> None:
        """Read an entry into ``target``, which has its size, and verify it."""
        entry = self.entries[name]
        chunks = (target[at : at + _CHUNK] for at in range(0, entry.size, _CHUNK))
        self._verify(name, chunks)

    def verify(self, name: str) -> None:
        """Verify an entry, without keeping its bytes."""
        size = self.entries[name].size
        buffer = memoryview(bytearray(min(size, _CHUNK)))
        self._verify(name, (buffer[: size - at] for at in range(0, size, _CHUNK)))

    def verify_rest(self) -> None:
        """Verify the entries that have been neither read nor verified."""
        for name in sorted(self._unverified):
            self.verify(name)

    def _verify(self, name: str, chunks: Iterator[memoryview]) -> None:
        entry = self.entries[name]
        crc = 0
        self._file.seek(entry.start)
        for chunk in chunks:
            if self._file.readinto(chunk) != len(chunk):
                raise damaged('it became shorter while it was read')
            if self._has_crc:
                crc = zlib.crc32(chunk, crc)
        if self._has_crc and crc != entry.crc:
            raise damaged(f'the bytes of {name!r} do not match its checksum')
        self._unverified.discard(name)

    def _at(self, offset: int, size: int) -> bytes:
        """Up to ``size`` bytes of the file, beginning at ``offset``."""
        self._file.seek(offset)
        return self._file.read(size)

    def _find_directory(self) -> tuple[int, bytes, int]:
        """Find the directory: its offset, its bytes, and its number of entries."""
        at = self._size - _END.size
        tail = self._at(at, _END.size) if at >= 0 else b''
        if tail[:4] != b'PK\x05\x06' or tail[-2:] != b'\0\0':
            raise damaged('its archive has no end record, or bytes after it')
        _, disk, first_disk, count_here, count, length, offset, _ = _END.unpack(tail)
        found = (disk, first_disk, count_here, count, length, offset)
        locator = self._at(max(at - _LOCATOR_64.size, 0), _LOCATOR_64.size)
        if locator[:4] == b'PK\x06\x07':
            _, _, at, _ = _LOCATOR_64.unpack(locator)
            end = self._at(at, _END_64.size) if at < self._size else b''
            if len(end) < _END_64.size or end[:4] != b'PK\x06\x06':
                raise damaged('the end record of its archive is broken')
            wide = _END_64.unpack(end)[4:]
            narrow = (0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF, _WIDE, _WIDE)
            if any(
                a not in (b, top) for a, b, top in zip(found, wide, narrow, strict=True)
            ):
                raise damaged('the two end records of its archive differ')
            found = wide
        disk, first_disk, count_here, count, length, offset = found
        if disk or first_disk or count_here != count or offset + length != at:
            raise damaged('the directory of its archive is not where its end record says')
        if count > _MOST_ENTRIES or length > _LARGEST_DIRECTORY:
            raise excessive(f'an archive of {count} entries')
        return offset, self._at(offset, length), count

    def _walk(self, directory: bytes, end: int, count: int) -> Iterator[tuple[str, Entry]]:
        """The entries of the directory, each compared with its header."""
        at = 0
        for _ in range(count):
            fixed = directory[at : at + _CENTRAL.size]
            if len(fixed) < _CENTRAL.size or fixed[:4] != b'PK\x01\x02':
                raise damaged('the directory of its archive is broken')
            fields = _CENTRAL.unpack(fixed)
            _, _, _, flags, method, _, _, crc, packed, size, *lengths = fields
            name_length, extra_length, comment_length, _, _, _, offset = lengths
            at += _CENTRAL.size
            raw_name = directory[at : at + name_length]
            extra = directory[at + name_length : at + name_length + extra_length]
            at += name_length + extra_length + comment_length
            name = raw_name.decode('utf-8', 'backslashreplace')
            if flags & _ENCRYPTED:
                raise damaged(f'{name!r} in its archive is encrypted')
            if method:
                raise Refusal(
                    f'has an entry {name!r} that is compressed',
                    'give the file that torch wrote, or pack it again without compression',
                )
            if flags & ~(_SIZES_FOLLOW | _UTF_8):
                raise damaged(f'{name!r} in its archive has unknown flags')
            size, packed, offset = _widened((size, packed, offset), extra)
            if size != packed:
                raise damaged(f'{name!r} in its archive has two sizes')
            header = self._header(offset, raw_name, flags) if offset < end else None
            # With this flag the header may hold 0, and the values follow the data.
            late = {0} if flags & _SIZES_FOLLOW else set()
            if not header or any(
                said not in {known, *late}
                for said, known in zip(header[1:], (crc, size, size), strict=True)
            ):
                raise damaged(f'{name!r} in its archive differs from its directory')
            yield name, Entry(offset, header[0], size, crc)
        if at != len(directory):
            raise damaged('the directory of its archive is broken')

    def _header(
        self, offset: int, name: bytes, flags: int
    ) -> tuple[int, int, int, int] | None:
        """Read the header in front of the data.

        Returns:
            The offset of the data, its CRC-32, and its size, compressed and not;
            ``None`` if there is no header with this name and these flags.
        """
        header = self._at(offset, _LOCAL.size + len(name))
        if len(header) < _LOCAL.size + len(name) or header[:4] != SIGNATURE:
            return None
        _, _, own_flags, method, _, _, crc, packed, size, name_length, extra_length = (
            _LOCAL.unpack(header[: _LOCAL.size])
        )
        if (own_flags, method, name_length) != (flags, 0, len(name)):
            return None
        if header[_LOCAL.size :] != name:
            return None
        start = offset + len(header) + extra_length
        if _WIDE in (packed, size):
            extra = self._at(offset + len(header), extra_length)
            size, packed = _widened((size, packed), extra)
        return start, crc, packed, size


def _widened(values: tuple[int, ...], extra: bytes) -> Iterator[int]:
    """Yield the values, with those of more than 32 bits read from the extra field."""
    at, wide = 0, b''
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from('<2H', extra, at)
        if kind == 1:
            wide = extra[at + 4 : at + 4 + length]
            break
        at += 4 + length
    for value in values:
        if value == _WIDE and len(wide) >= 8:
            value, wide = int.from_bytes(wide[:8], 'little'), wide[8:]
        yield value
