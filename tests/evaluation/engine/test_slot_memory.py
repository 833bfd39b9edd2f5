"""Slots: aligned records that hold exactly what is on disk, or its conversion."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from evaluation.engine.slot_memory import ALIGN_BYTES, SlotMemory, record_bytes
from evaluation.engine.store import ExpertShape, ExpertStore

Checkpoint = Callable[..., Path]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
def test_a_slot_holds_the_fused_matrices_of_its_expert(checkpoint: Checkpoint, family: str, dtype: torch.dtype) -> None:
    folder = checkpoint(family)
    store, tensors = ExpertStore(folder), load_file(folder / "model.safetensors")
    memory = SlotMemory(store.shape, 3, dtype)
    module = store.modules[1]
    gate, up, down = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    for slot, expert in ((2, 5), (0, 1), (2, 4), (1, 0)):
        assert memory.fill(slot, store, 1, expert) == store.shape.expert_bytes
        parts = [tensors[f"{module}.{expert}.{part}.weight"].to(dtype) for part in (gate, up, down)]
        assert torch.equal(memory.gate_up_JH(slot), torch.cat(parts[:2]))
        assert torch.equal(memory.down_HI(slot), parts[2])
    assert torch.equal(memory.down_HI(0), tensors[f"{module}.1.{down}.weight"].to(dtype)), "other slots keep theirs"


def test_matrices_start_on_aligned_addresses_whatever_their_size() -> None:
    shape = ExpertShape(hidden=10, intermediate=7, dtype="BF16")
    memory = SlotMemory(shape, 5, torch.bfloat16)
    assert record_bytes(shape, torch.bfloat16) == 192 + 320
    for slot in range(5):
        assert memory.gate_up_JH(slot).data_ptr() % ALIGN_BYTES == 0
        assert memory.down_HI(slot).data_ptr() % ALIGN_BYTES == 0
