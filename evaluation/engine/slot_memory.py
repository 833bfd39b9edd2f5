"""The memory of the slots: allocated once, one record per slot, and filled straight from disk.

A record is [down | gate | up], each half on a 64-byte boundary: gate followed by up is the fused `gate_up` matrix
transformers computes with, and a start off the boundary gives other last bits in fp32 (torch 2.13 on x86).
Axes: H hidden, I intermediate, J = 2 I (gate, then up).
"""

import math
import mmap
from collections.abc import Sequence

import numpy as np
import torch

from evaluation.engine.reader import Bytes, Span
from evaluation.engine.store import ExpertShape, Extent

ALIGN_BYTES = 64
TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def record_bytes(shape: ExpertShape, dtype: torch.dtype) -> int:
    """Bytes of one slot when computing in `dtype`."""
    matrix = shape.hidden * shape.intermediate * dtype.itemsize
    return _aligned(matrix) + _aligned(2 * matrix)


class SlotMemory:
    """`slots` records for experts of one shape, in `dtype`, and `passing` more for experts that do not stay.

    If the checkpoint's precision is another, experts are read into `passing` records of that precision and converted.

    Attributes:
        passing_slots: numbers of the slots for experts that do not stay, after those of the cache.
        converts: whether what is read must be converted before it can be used.
    """

    def __init__(self, shape: ExpertShape, slots: int, dtype: torch.dtype, *, passing: int = 1) -> None:
        stored = TORCH_DTYPES[shape.dtype]
        self.dtype, self.gate_up_columns, self.converts = dtype, 2 * shape.intermediate, stored != dtype
        self._records = _Records(shape, slots + (1 if self.converts else passing), dtype)
        self._landing = _Records(shape, passing, stored) if self.converts else self._records
        self.passing_slots = range(slots, slots + passing)
        self._first_landing = slots if self.converts else 0

    @property
    def passing_bytes(self) -> int:
        """Memory on top of the cache's slots."""
        of_cache = self.passing_slots.start * self._records.record_bytes
        return self._records.total_bytes - of_cache + (self._landing.total_bytes if self.converts else 0)

    def gate_up_JH(self, slot: int) -> torch.Tensor:
        """Gate and up of the expert in `slot`; a view."""
        return self._records.gate_up_SJH[slot]

    def down_HI(self, slot: int) -> torch.Tensor:
        """Down of the expert in `slot`; a view."""
        return self._records.down_SHI[slot]

    def spans(self, slot: int, extents: Sequence[Extent]) -> list[Span]:
        """Where in `slot` these parts of an expert go; if precisions differ, a passing slot is meant."""
        return [span for extent in extents for span in self._landing.spans(slot - self._first_landing, extent)]

    def convert(self, passing_slot: int, into: int | None) -> int:
        """Move what was read into slot `into`, or into the one that stands in for it; returns that slot."""
        slot = self.passing_slots.start if into is None else into
        source = passing_slot - self._first_landing
        self._records.gate_up_SJH[slot].copy_(self._landing.gate_up_SJH[source])
        self._records.down_SHI[slot].copy_(self._landing.down_SHI[source])
        return slot


class _Records:
    """Raw records and the matrices in them as views."""

    def __init__(self, shape: ExpertShape, slots: int, dtype: torch.dtype) -> None:
        hidden, intermediate = shape.hidden, shape.intermediate
        matrix_bytes = hidden * intermediate * dtype.itemsize
        gate_start = _aligned(matrix_bytes)
        self.record_bytes = record_bytes(shape, dtype)
        self.total_bytes = slots * self.record_bytes
        self._memory = _huge_pages(self.total_bytes)
        self._places = {  # of each role in a record: start and length
            "down": (0, matrix_bytes),
            "gate": (gate_start, matrix_bytes),
            "up": (gate_start + matrix_bytes, matrix_bytes),
        }
        raw = torch.from_numpy(self._memory).view(slots, self.record_bytes)
        down, gate_up = raw[:, :matrix_bytes], raw[:, gate_start : gate_start + 2 * matrix_bytes]
        self.down_SHI = down.view(dtype).unflatten(1, (hidden, intermediate))
        self.gate_up_SJH = gate_up.view(dtype).unflatten(1, (2 * intermediate, hidden))

    def spans(self, slot: int, extent: Extent) -> list[Span]:
        """The extent as one span, or as several if what is adjacent in the file is not so in a record."""
        spans: list[Span] = []
        offset, target_end = extent.offset, -1
        for role in extent.roles:
            start, length = self._places[role]
            start += slot * self.record_bytes
            if start == target_end:
                first = spans.pop()
                start, offset = target_end - len(first.target), first.offset
                length += len(first.target)
            target_end = start + length
            spans.append(Span(extent.shard, offset, self._memory[start:target_end]))
            offset += length
        return spans


def _huge_pages(size_bytes: int) -> Bytes:
    """Zeroed memory on a page boundary, in 2 MiB pages where the kernel has them to give."""
    memory = mmap.mmap(-1, max(size_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype=np.uint8, count=size_bytes)


def _aligned(size_bytes: int) -> int:
    return math.ceil(size_bytes / ALIGN_BYTES) * ALIGN_BYTES
