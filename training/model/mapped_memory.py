"""Memory that is mapped by hand: in large pages, or in a file.

2 MiB pages, where the kernel has them to give: the fewer pages a read fills, the fewer pieces the device is handed. Into 4 KiB
pages the same reads were half as fast (a virtio disk, reads of 1 and 3 MiB, Linux 6.18: 1.2 to 1.9 GB/s instead of 2.5 to 2.7),
and so was writing a matrix of 33 MB column by column.
"""

import math
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile

import torch
from torch import Tensor

from configs.load import UserError
from configs.sizes import size_text

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


class DiskTensor:
    """A tensor of zeros in a file, to be written and read as any other; what is not used for a while is left to the disk.

    The file has no name and is gone when the process is, however that ends.

    Raises:
        UserError: the disk has no room for it.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, folder: Path) -> None:
        length_bytes = math.prod(shape) * dtype.itemsize
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=folder) as file:
                os.posix_fallocate(file.fileno(), 0, length_bytes)  # or a full disk would end the process later
                self._mapped = mmap.mmap(file.fileno(), length_bytes)
        except OSError as error:
            raise UserError(
                f"{size_text(length_bytes)} of weights cannot be written into {folder} ({error.strerror}); free some space, or "
                "write an output_dir on another disk"
            ) from error
        self.tensor: Tensor = torch.frombuffer(self._mapped, dtype=dtype).view(*shape)

    def read_ahead(self, some: slice) -> None:
        """Begin to read a slice of the first dimension."""
        row_bytes = self.tensor[0].nbytes
        start, stop, _ = (row * row_bytes for row in some.indices(len(self.tensor)))
        start -= start % mmap.PAGESIZE
        if start < stop:
            self._mapped.madvise(mmap.MADV_WILLNEED, start, stop - start)
