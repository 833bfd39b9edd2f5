"""Memory in whole pages for reads past the page cache, in 2 MiB pages where the kernel has them to give.

The fewer pages a read fills, the fewer pieces the device is handed: with 4 KiB pages the same reads were half as fast
(virtio disk, reads of 1 and 3 MiB, Linux 6.18; `python -m evaluation.bench_reads` shows it on yours).
"""

import mmap

PAGE_BYTES = 4096
"""What `O_DIRECT` wants file offsets and addresses to be multiples of, on every file system."""


def huge_pages(size_bytes: int) -> mmap.mmap:
    """Zeroed memory on a page boundary; a page costs memory once it is touched."""
    memory = mmap.mmap(-1, max(size_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
