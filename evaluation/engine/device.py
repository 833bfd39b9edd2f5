"""Where a model computes: the processor, or an accelerator beside it; what is done differently there, and nothing else.

`Host` and `Accelerator` allocate the records of slots, copy experts into them and multiply. Bits are those of the resident
model on the same device. Axes: M rows, K and N of the matrix that they are multiplied by.
"""

import math
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from configs.load import UserError
from evaluation.engine.store.pages import give_back
from evaluation.engine.store.records import ALIGN_BYTES
from training.model.host_memory import huge_pages

CPU = torch.device("cpu")
VECTOR = 64
"""Numbers that torch's element-wise loops take at once: two registers of 512 bits, in 16-bit precision."""
THREAD_GRAIN = 32768
"""Numbers below which torch does not give an element-wise operation to several threads (at::internal::GRAIN_SIZE)."""


def find_device(name: str | torch.device) -> torch.device:
    """The device of this name, or `UserError` if there is none; `auto`: the accelerator, or else the processor.

    Of several accelerators each process that a launcher started has its own, unless the name has a number.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None and "LOCAL_RANK" in os.environ:
        accelerator = torch.device(accelerator.type, int(os.environ["LOCAL_RANK"]) % torch.accelerator.device_count())
    if accelerator is not None and name == accelerator.type:
        return accelerator
    if name == "auto":
        return accelerator or CPU
    try:
        found = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device {name!r} is not known to torch; write cpu, cuda or auto") from error
    if found.type not in (CPU.type, accelerator and accelerator.type):
        raise UserError(f"device is {name!r}, and torch finds no such accelerator here; write cpu")
    return found


class Block(NamedTuple):
    """Memory for records."""

    raw: Tensor  # bytes
    release: Callable[[int, int], None] = lambda start, end: None  # gives whole pages back, for a memory budget


class Host:
    """The processor: experts are read straight into their slots, unless precisions differ; copies are done on return."""

    torch_device = CPU
    reads_into_slots = True
    decodes_in_batches = False

    def allocate(self, size_bytes: int) -> Block:
        """Memory that products read from."""
        memory = huge_pages(size_bytes)
        raw = torch.from_numpy(np.frombuffer(memory, dtype=np.uint8, count=size_bytes))
        return Block(raw, lambda start, end: give_back(memory, start, end))

    def allocate_landing(self, size_bytes: int) -> Block:
        """Memory that files are read into, where that cannot be the slots."""
        return self.allocate(size_bytes)

    def resident(self, tensor: Tensor) -> Tensor:
        """A copy that starts as far off a 64-byte boundary: last bits of products depend on it."""
        if not tensor.is_contiguous():
            return tensor
        memory = torch.empty(tensor.nbytes + ALIGN_BYTES, dtype=torch.uint8)
        start = (tensor.data_ptr() - memory.data_ptr()) % ALIGN_BYTES
        copy = memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        return copy.copy_(tensor)

    def copy_in(self, pairs: Iterable[tuple[Tensor, Tensor]], *, passing_slot: int, slot: int) -> None:
        """Copy each (into, from), which lie in `slot` and were read into `passing_slot`."""
        for into, source in pairs:
            into.copy_(source)

    def used(self, slot: int) -> None:
        """Note that the products that were asked for last are with what lies in `slot`."""

    def wait(self, passing_slot: int) -> None:
        """Return when `passing_slot` may be read into."""

    def multiply(self, rows_MK: Tensor, weight_KN: Tensor, *, out: Tensor, sizes: Sequence[int]) -> Tensor:
        """`rows_MK @ weight_KN` into `out`, which it returns, by the kernel that the resident model's products go through.

        `sizes`: how many rows to compute with, see `filled_rows.py`.
        """
        count = len(rows_MK)
        size = sizes[count] if count < len(sizes) else count
        if size == count:
            return torch.mm(rows_MK, weight_KN, out=out)
        filled_MK = rows_MK.new_zeros(size, rows_MK.shape[1])
        filled_MK[:count] = rows_MK
        return out.copy_(torch.mm(filled_MK, weight_KN)[:count])

    def rows_are_independent(self, counts: Collection[int], columns: int) -> bool:
        """Whether an activation gives a row of `columns` numbers the same bits in matrices of each of these numbers of rows.

        Its vectorised loop leaves the rest of a run of numbers to a scalar one that rounds differently (silu in fp32), and a
        run ends where the matrix or a thread's share of it does. Without such rests every row stands alone.
        """
        return columns % VECTOR == 0 and all(_share_of_a_thread(rows * columns) % VECTOR == 0 for rows in counts)


class Accelerator:
    """Slots lie in its memory: experts are read into pinned memory and copied from there on a stream of their own.

    A copy waits for the last product that used its slot, the next products wait for the copy, and what was read is not
    overwritten before it was copied.
    """

    reads_into_slots = False
    decodes_in_batches = True  # `generate` (transformers 5.23) turns to batched products after the first step

    def __init__(self, device: torch.device) -> None:
        self.torch_device = device
        self._copies = torch.Stream(device)
        self._used: dict[int, torch.Event] = {}  # slot -> its last product
        self._copied: dict[int, torch.Event] = {}  # passing slot -> its last copy

    def allocate(self, size_bytes: int) -> Block:
        """Memory that products read from; copies wait for whoever had it before."""
        raw = torch.empty(size_bytes, dtype=torch.uint8, device=self.torch_device)
        self._copies.wait_event(torch.accelerator.current_stream().record_event())
        return Block(raw)

    def allocate_landing(self, size_bytes: int) -> Block:
        """Pinned memory that files are read into."""
        return Block(torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True))

    def resident(self, tensor: Tensor) -> Tensor:
        """A copy in the accelerator's memory."""
        return tensor.to(self.torch_device)

    def copy_in(self, pairs: Iterable[tuple[Tensor, Tensor]], *, passing_slot: int, slot: int) -> None:
        """Start to copy each (into, from), which lie in `slot` and were read into `passing_slot`."""
        with self._copies:
            if slot in self._used:
                self._copies.wait_event(self._used[slot])
            for into, source in pairs:
                into.copy_(source, non_blocking=True)
            self._copied[passing_slot] = self._copies.record_event()
        torch.accelerator.current_stream().wait_event(self._copied[passing_slot])

    def used(self, slot: int) -> None:
        """Note that the products that were asked for last are with what lies in `slot`."""
        self._used[slot] = torch.accelerator.current_stream().record_event()

    def wait(self, passing_slot: int) -> None:
        """Return when `passing_slot` may be read into."""
        if passing_slot in self._copied:
            self._copied.pop(passing_slot).synchronize()

    def multiply(self, rows_MK: Tensor, weight_KN: Tensor, *, out: Tensor, sizes: Sequence[int]) -> Tensor:
        """`rows_MK @ weight_KN` into `out`, which it returns; `sizes` are for the processor's kernels alone."""
        end = torch.full((1,), len(rows_MK), dtype=torch.int32, device=out.device)
        return out.copy_(torch.nn.functional.grouped_mm(rows_MK, weight_KN[None], offs=end))

    def rows_are_independent(self, counts: Collection[int], columns: int) -> bool:
        """Whether an activation gives a row the same bits among any number of rows: no loop here has a scalar rest."""
        return True


HOST = Host()
Device = Host | Accelerator


def device_at(where: torch.device) -> Device:
    """What computes there."""
    return HOST if where.type == CPU.type else Accelerator(where)


def _share_of_a_thread(numbers: int) -> int:
    """How many of a matrix's numbers torch gives to one thread in an element-wise operation (ATen/Parallel.h)."""
    threads = min(torch.get_num_threads(), math.ceil(numbers / THREAD_GRAIN))
    return math.ceil(numbers / threads)
