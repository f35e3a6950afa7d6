"""Give memory back: of tensors that are mapped from a file, and what is free."""

import ctypes
import mmap
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor


class MappedFile:
    """A checkpoint that was read with ``mmap=True``, while its tensors are in use.

    A page of it counts as the process's memory from its first reading until the whole
    file is let go. Given back, it costs nothing, and is read again when needed.

    Where the system does not tell what is mapped where, as Linux does, nothing is.

    Args:
        path: The file; one that is not mapped has no pages to give back.
    """

    def __init__(self, path: str | Path) -> None:
        name = os.path.realpath(Path(path).expanduser())
        maps = Path('/proc/self/maps')
        lines = maps.read_text().splitlines() if maps.is_file() else []
        self._regions = [
            tuple(int(address, 16) for address in line.split()[0].split('-'))
            for line in lines
            if line.endswith(f' {name}')
        ]

    def release(self, tensors: Iterable[Tensor]) -> None:
        """Give back the pages of those tensors that lie in the file.

        They must be as they were read: a change would be lost.
        """
        page = mmap.PAGESIZE
        for tensor in tensors:
            start = tensor.data_ptr()
            stop = start + tensor.numel() * tensor.element_size()
            if any(first <= start and stop <= last for first, last in self._regions):
                # Whole pages alone: the first and the last may be a neighbour's, too.
                start, stop = -(-start // page) * page, stop // page * page
                if start < stop:
                    advise = ctypes.CDLL(None).madvise
                    length = ctypes.c_size_t(stop - start)
                    advise(ctypes.c_void_p(start), length, mmap.MADV_DONTNEED)


def release_free_memory() -> None:
    """Give back what was freed and the C library keeps, where it is one that can."""
    if sys.platform == 'linux':
        trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
        if trim is not None:
            trim(0)
