"""The memory of the slots: allocated once, one record per slot, and filled straight from disk.

A record is [down | gate | up], each half on a 64-byte boundary: gate followed by up is the fused `gate_up` matrix
transformers computes with, and a start off the boundary gives other last bits in fp32 (torch 2.13 on x86).
Axes: H hidden, I intermediate, J = 2 I (gate, then up).
"""

import math
from collections.abc import Sequence

import torch

from evaluation.engine.store import ROLES, ExpertShape, ExpertStore

ALIGN_BYTES = 64
TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def record_bytes(shape: ExpertShape, dtype: torch.dtype) -> int:
    """Bytes of one slot when computing in `dtype`."""
    matrix = shape.hidden * shape.intermediate * dtype.itemsize
    return _aligned(matrix) + _aligned(2 * matrix)


class SlotMemory:
    """`slots` records for experts of one shape, in `dtype`, and a spare one for experts that only pass through.

    Another stored dtype is converted after reading.
    """

    def __init__(self, shape: ExpertShape, slots: int, dtype: torch.dtype) -> None:
        self._records = _Records(shape, slots + 1, dtype)
        self.spare_slot = slots
        self.dtype, self.gate_up_columns = dtype, 2 * shape.intermediate
        stored = TORCH_DTYPES[shape.dtype]
        self._staging = None if stored == dtype else _Records(shape, 1, stored)

    def gate_up_JH(self, slot: int) -> torch.Tensor:
        """Gate and up of the expert in `slot`; a view."""
        return self._records.gate_up_SJH[slot]

    def down_HI(self, slot: int) -> torch.Tensor:
        """Down of the expert in `slot`; a view."""
        return self._records.down_SHI[slot]

    def fill(self, slot: int, store: ExpertStore, layer_id: int, expert: int, *, roles: Sequence[str] = ROLES) -> int:
        """Read an expert, or some of its matrices, into `slot`; returns the bytes read. After an error it holds rubbish."""
        target = self._records if self._staging is None else self._staging
        parts = target.parts(slot if self._staging is None else 0)
        read_bytes = store.read(layer_id, expert, {role: parts[role] for role in roles})
        if self._staging is not None:
            if "gate" in roles:
                self._records.gate_up_SJH[slot].copy_(self._staging.gate_up_SJH[0])
            if "down" in roles:
                self._records.down_SHI[slot].copy_(self._staging.down_SHI[0])
        return read_bytes


class _Records:
    """Raw records and the matrices in them as views."""

    def __init__(self, shape: ExpertShape, slots: int, dtype: torch.dtype) -> None:
        hidden, intermediate = shape.hidden, shape.intermediate
        self._matrix_bytes = hidden * intermediate * dtype.itemsize
        self._gate_start = _aligned(self._matrix_bytes)
        self._record_bytes = record_bytes(shape, dtype)
        raw = torch.empty(slots, self._record_bytes, dtype=torch.uint8)
        assert raw.data_ptr() % ALIGN_BYTES == 0, "torch allocates on 64-byte boundaries"
        down = raw[:, : self._matrix_bytes]
        gate_up = raw[:, self._gate_start : self._gate_start + 2 * self._matrix_bytes]
        self.down_SHI = down.view(dtype).unflatten(1, (hidden, intermediate))
        self.gate_up_SJH = gate_up.view(dtype).unflatten(1, (2 * intermediate, hidden))
        self._bytes = raw.numpy().data.cast("B")

    def parts(self, slot: int) -> dict[str, memoryview]:
        """The three matrices of a record as writable bytes, by role."""
        down, gate = slot * self._record_bytes, slot * self._record_bytes + self._gate_start
        size = self._matrix_bytes
        return {
            "down": self._bytes[down : down + size],
            "gate": self._bytes[gate : gate + size],
            "up": self._bytes[gate + size : gate + 2 * size],
        }


def _aligned(size_bytes: int) -> int:
    return math.ceil(size_bytes / ALIGN_BYTES) * ALIGN_BYTES
