"""Memory in whole pages for reads past the page cache, in 2 MiB pages where the kernel has them to give.

The fewer pages a read fills, the fewer pieces the device is handed: into 4 KiB pages the same reads were half as fast
(a virtio disk, reads of 1 and 3 MiB, Linux 6.18: 1.2 to 1.9 GB/s instead of 2.5 to 2.7).
"""

import mmap

PAGE_BYTES = 4096
"""What `O_DIRECT` wants file offsets and addresses to be multiples of, on every file system."""
HUGE_BYTES = 2**21


def huge_pages(size_bytes: int) -> mmap.mmap:
    """Zeroed memory of this many bytes, or more; a page costs memory once it is touched.

    Linux (6.9 and later) starts a map where a huge page may start only if it is as long as some of them.
    """
    whole_bytes = -(-max(size_bytes, 1) // HUGE_BYTES) * HUGE_BYTES
    memory = mmap.mmap(-1, whole_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def give_back(memory: mmap.mmap, start: int, end: int) -> None:
    """Give the whole pages between two bytes back to the system: what they share with their neighbours stays."""
    start, end = -(-start // PAGE_BYTES) * PAGE_BYTES, end // PAGE_BYTES * PAGE_BYTES
    if end > start:
        memory.madvise(mmap.MADV_DONTNEED, start, end - start)
