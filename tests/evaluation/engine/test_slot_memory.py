"""Slots: aligned records that hold exactly what is on disk, or its conversion."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from evaluation.engine.slot_memory import SlotMemory
from evaluation.engine.store.experts import ExpertStore
from evaluation.engine.store.records import ALIGN_BYTES

Checkpoint = Callable[..., Path]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
def test_a_slot_holds_the_fused_matrices_of_its_expert(checkpoint: Checkpoint, family: str, dtype: torch.dtype) -> None:
    folder = checkpoint(family)
    store, tensors = ExpertStore(folder), load_file(folder / "model.safetensors")
    memory = SlotMemory(store, 3, dtype, passing=2)
    assert memory.converts == (dtype == torch.float32)
    module = "model.layers.1.block_sparse_moe.experts" if family == "mixtral" else "model.layers.1.mlp.experts"
    gate, up, down = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    for slot, expert in ((2, 5), (0, 1), (2, 4), (1, 0)):
        fill(memory, slot, expert)
        parts = [tensors[f"{module}.{expert}.{part}.weight"].to(dtype) for part in (gate, up, down)]
        assert torch.equal(memory.gate_up_HJ(slot), torch.cat(parts[:2]).T)
        assert torch.equal(memory.down_IH(slot), parts[2].T)
    assert torch.equal(memory.down_IH(0), tensors[f"{module}.1.{down}.weight"].to(dtype).T), "other slots keep theirs"


def fill(memory: SlotMemory, slot: int, expert: int, *, layer: int = 1) -> None:
    """Read an expert into a slot."""
    read_into = memory.passing_slots[-1] if memory.converts else slot
    for span in memory.spans(read_into, layer, expert):
        span.target[:] = np.fromfile(span.shard, dtype=np.uint8, count=len(span.target), offset=span.offset)
    if memory.converts:
        assert memory.convert(read_into, slot) == slot


def test_what_is_adjacent_in_file_and_record_is_one_span(checkpoint: Checkpoint) -> None:
    separate, fused = (ExpertStore(checkpoint(family)) for family in ("olmoe", "granitemoe"))
    assert len(SlotMemory(separate, 2, torch.bfloat16).spans(1, 1, 3)) == 1
    spans = SlotMemory(fused, 2, torch.bfloat16).spans(1, 1, 3)
    assert sorted(len(s.target) for s in spans) == sorted(
        part.stored.length_bytes for part in fused.format.parts.values()
    )


def test_memory_on_top_of_the_slots_is_told(checkpoint: Checkpoint) -> None:
    store = ExpertStore(checkpoint("olmoe"))
    record = store.record(2).total_bytes
    assert SlotMemory(store, 5, torch.bfloat16, passing=3).passing_bytes == 3 * record
    converting = SlotMemory(store, 5, torch.float32, passing=3)
    assert converting.passing_bytes == 3 * record + 2 * record, "three as stored and one to compute with"


@pytest.mark.parametrize("family", ["olmoe", "granitemoe"])
def test_swapped_slots_have_each_others_experts(checkpoint: Checkpoint, family: str) -> None:
    memory = SlotMemory(ExpertStore(checkpoint(family)), 3, torch.bfloat16, passing=1, ahead=2)
    ahead = memory.ahead_slots[1]
    assert ahead == 5
    fill(memory, 1, 0)
    fill(memory, ahead, 3)
    before = {slot: (memory.gate_up_HJ(slot).clone(), memory.down_IH(slot).clone()) for slot in (1, ahead)}
    memory.swap(1, ahead)
    for slot, other in ((1, ahead), (ahead, 1)):
        assert torch.equal(memory.gate_up_HJ(slot), before[other][0])
        assert torch.equal(memory.down_IH(slot), before[other][1])
    fill(memory, ahead, 2)
    assert torch.equal(memory.down_IH(1), before[ahead][1]), "reading into one leaves the other"


def test_a_swapped_slot_gives_back_its_own_memory(checkpoint: Checkpoint) -> None:
    memory = SlotMemory(ExpertStore(checkpoint("pages")), 3, torch.bfloat16, passing=1, ahead=1)
    ahead = memory.ahead_slots[0]
    fill(memory, 1, 0)
    fill(memory, ahead, 3)
    memory.swap(1, ahead)
    kept = memory.down_IH(ahead).clone()
    memory.release(1)
    assert not memory.down_IH(1).any()
    assert torch.equal(memory.down_IH(ahead), kept)
    assert kept.any()


def test_experts_that_start_differently_off_a_boundary_take_turns_in_a_slot(checkpoint: Checkpoint) -> None:
    folder = checkpoint("gpt_oss")
    store, tensors = ExpertStore(folder), load_file(folder / "model.safetensors")
    assert len({store.leads(layer, 2).down for layer in (0, 1)}) == 2
    memory = SlotMemory(store, 2, torch.bfloat16)
    for layer in (0, 1, 0):
        fill(memory, 1, 2, layer=layer)
        experts = f"model.layers.{layer}.mlp.experts"
        assert torch.equal(memory.down_IH(1), tensors[f"{experts}.down_proj"][2])
        assert torch.equal(memory.gate_up_HJ(1), tensors[f"{experts}.gate_up_proj"][2])


@pytest.mark.parametrize(
    ("family", "dtype"), [("olmoe", "bfloat16"), ("granitemoe", "float32"), ("gpt_oss", "bfloat16")]
)
@pytest.mark.parametrize("computed", ["float32", "bfloat16"])
def test_matrices_start_off_a_boundary_as_they_do_in_the_resident_model(
    checkpoint: Checkpoint, family: str, dtype: str, computed: str
) -> None:
    folder, chosen = checkpoint(family, dtype), getattr(torch, computed)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=chosen)
    experts = next(module for module in model.model.layers[1].modules() if hasattr(module, "gate_up_proj"))
    memory = SlotMemory(ExpertStore(folder), 3, chosen)
    for expert in range(4):
        fill(memory, 2, expert)
        for resident, paged in (
            (experts.gate_up_proj[expert], memory.gate_up_HJ(2)),
            (experts.down_proj[expert], memory.down_IH(2)),
        ):
            assert torch.equal(resident if experts.is_transposed else resident.T, paged)
            assert resident.data_ptr() % ALIGN_BYTES == paged.data_ptr() % ALIGN_BYTES
