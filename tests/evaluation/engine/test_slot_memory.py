"""Slots: aligned records that hold exactly what is on disk, or its conversion."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from evaluation.engine.slot_memory import ALIGN_BYTES, SlotMemory, record_bytes
from evaluation.engine.store import ExpertShape, ExpertStore, Extent

Checkpoint = Callable[..., Path]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
def test_a_slot_holds_the_fused_matrices_of_its_expert(checkpoint: Checkpoint, family: str, dtype: torch.dtype) -> None:
    folder = checkpoint(family)
    store, tensors = ExpertStore(folder), load_file(folder / "model.safetensors")
    memory = SlotMemory(store.shape, 3, dtype, passing=2)
    assert memory.converts == (dtype == torch.float32)
    module = store.modules[1]
    gate, up, down = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    for slot, expert in ((2, 5), (0, 1), (2, 4), (1, 0)):
        fill(memory, slot, store.extents(1, expert))
        parts = [tensors[f"{module}.{expert}.{part}.weight"].to(dtype) for part in (gate, up, down)]
        assert torch.equal(memory.gate_up_JH(slot), torch.cat(parts[:2]))
        assert torch.equal(memory.down_HI(slot), parts[2])
    assert torch.equal(memory.down_HI(0), tensors[f"{module}.1.{down}.weight"].to(dtype)), "other slots keep theirs"


def fill(memory: SlotMemory, slot: int, extents: Sequence[Extent]) -> None:
    read_into = memory.passing_slots[-1] if memory.converts else slot
    for span in memory.spans(read_into, extents):
        span.target[:] = np.fromfile(span.shard, dtype=np.uint8, count=len(span.target), offset=span.offset)
    if memory.converts:
        assert memory.convert(read_into, slot) == slot


def test_what_is_adjacent_in_file_and_record_is_one_span() -> None:
    extent = Extent(Path("shard"), 100, ("down", "gate", "up"))
    even, odd = (
        ExpertShape(hidden=32, intermediate=8, dtype="BF16"),
        ExpertShape(hidden=10, intermediate=7, dtype="BF16"),
    )
    assert [(s.offset, len(s.target)) for s in SlotMemory(even, 2, torch.bfloat16).spans(1, [extent])] == [(100, 1536)]
    assert [(s.offset, len(s.target)) for s in SlotMemory(odd, 2, torch.bfloat16).spans(1, [extent])] == [
        (100, 140),
        (240, 280),
    ]


def test_memory_on_top_of_the_slots_is_told() -> None:
    shape = ExpertShape(hidden=32, intermediate=8, dtype="BF16")
    record = record_bytes(shape, torch.bfloat16)
    assert SlotMemory(shape, 5, torch.bfloat16, passing=3).passing_bytes == 3 * record
    converting = SlotMemory(shape, 5, torch.float32, passing=3)
    assert converting.passing_bytes == 3 * record + 2 * record, "three as stored and one to compute with"


def test_matrices_start_on_aligned_addresses_whatever_their_size() -> None:
    shape = ExpertShape(hidden=10, intermediate=7, dtype="BF16")
    memory = SlotMemory(shape, 5, torch.bfloat16)
    assert record_bytes(shape, torch.bfloat16) == 192 + 320
    for slot in range(5):
        assert memory.gate_up_JH(slot).data_ptr() % ALIGN_BYTES == 0
        assert memory.down_HI(slot).data_ptr() % ALIGN_BYTES == 0
