"""A tensor in a file, for weights that are larger than memory."""

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
