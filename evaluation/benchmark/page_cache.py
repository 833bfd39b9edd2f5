"""Takes files out of the page cache, and counts what is still in it: a cold start that is checked, not assumed."""

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np


def drop(paths: Iterable[Path]) -> None:
    """Write back what is dirty and advise the kernel to forget the files. Pages that a process has mapped stay."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached_bytes(paths: Iterable[Path]) -> int:
    """Bytes of the files that are in the page cache (mincore)."""
    return sum(_cached_bytes(path) for path in paths if path.stat().st_size)


def _cached_bytes(path: Path) -> int:
    data = np.memmap(path, np.uint8, mode="r")
    pages = np.zeros(-(-len(data) // mmap.PAGESIZE), np.uint8)
    libc, start = ctypes.CDLL(None, use_errno=True), ctypes.c_void_p(data.ctypes.data)
    if libc.mincore(start, ctypes.c_size_t(len(data)), ctypes.c_void_p(pages.ctypes.data)):
        raise OSError(ctypes.get_errno(), "mincore", str(path))
    return int((pages & 1).sum()) * mmap.PAGESIZE
