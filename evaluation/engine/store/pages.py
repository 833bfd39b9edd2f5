"""Whole pages: what reads past the page cache need, and what can be given back."""

import mmap

PAGE_BYTES = 4096
"""What `O_DIRECT` wants file offsets and addresses to be multiples of, on every file system."""


def give_back(memory: mmap.mmap, start: int, end: int) -> None:
    """Give the whole pages between two bytes back to the system: what they share with their neighbours stays."""
    start, end = -(-start // PAGE_BYTES) * PAGE_BYTES, end // PAGE_BYTES * PAGE_BYTES
    if end > start:
        memory.madvise(mmap.MADV_DONTNEED, start, end - start)
