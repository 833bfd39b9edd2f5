"""The host's memory: how much a process may hold, loading weights without holding much more than the weights, large pages."""

import ctypes
import gc
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGE_BYTES, USUAL_BYTES = 4 << 20, 32 << 20  # the second is what glibc comes to by itself
HUGE_BYTES = 2**21


def spare_memory() -> None:
    """Change settings of the whole process so that loading takes little more memory than what is loaded.

    Otherwise transformers reads weights ahead faster than it stacks them, and glibc keeps what was freed in pieces too small
    to be used again. Memory of large tensors is given back at once instead, which makes allocating them slower.
    """
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    _set_mmap_threshold(LARGE_BYTES)


@contextmanager
def sparing_memory() -> Iterator[None]:
    """Do as `spare_memory` while the block runs."""
    spare_memory()
    try:
        yield
    finally:
        _set_mmap_threshold(USUAL_BYTES)


def give_back_memory() -> None:
    """Return what is no longer used to the system; for a process whose memory is counted."""
    gc.collect()
    trim_heap()


def trim_heap() -> None:
    """Return what was freed to the system, where glibc keeps it for later."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _set_mmap_threshold(size: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # where there is a glibc
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, size)
        mallopt(M_TRIM_THRESHOLD, 2 * size)  # as glibc does; it stops once it is told the other


def memory_limit(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """The least limit, in bytes, of this process's memory group and those above it (cgroup v2, else v1); None without one.

    Source: kernel documentation, admin-guide/cgroup-v2 (memory.max) and cgroup-v1/memory (memory.limit_in_bytes).
    """
    limits = []
    for line in groups.read_text(encoding="utf-8").splitlines() if groups.exists() else []:
        _, controllers, path = line.split(":", 2)
        own = root / controllers / path.lstrip("/")
        for group in (own, *own.parents) if controllers in ("", "memory") else ():
            files = [group / "memory.max", group / "memory.limit_in_bytes"] if group.is_relative_to(root) else []
            limits += [file.read_text(encoding="utf-8").strip() for file in files if file.exists()]
    return min((int(limit) for limit in limits if limit.isdigit()), default=None)


def huge_pages(size_bytes: int) -> mmap.mmap:
    """Zeroed memory of this many bytes, or more, in pages of 2 MiB if the kernel has them; one costs memory once it is touched.

    The fewer pages a read fills, the fewer pieces the device is handed. Into 4 KiB pages the same reads were half as fast (a
    virtio disk, reads of 1 and 3 MiB, Linux 6.18: 1.2 to 1.9 GB/s instead of 2.5 to 2.7), and so was writing a matrix of 33 MB
    column by column.
    Linux (6.9 and later) starts a map where a huge page may start only if it is as long as some of them.
    """
    whole_bytes = -(-max(size_bytes, 1) // HUGE_BYTES) * HUGE_BYTES
    memory = mmap.mmap(-1, whole_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
