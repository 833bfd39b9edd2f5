"""A memory budget: divided without a rest, refused with the smallest that works, never exceeded as a context grows."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from configs.load import UserError
from evaluation.engine.loading import load
from evaluation.engine.memory.demand import Demand
from evaluation.engine.memory.division import Call, Division, divide, passing_slots
from evaluation.engine.memory.needs import SLACK_BYTES, Needs
from evaluation.engine.memory.process import private_bytes
from evaluation.engine.options import EngineOptions
from evaluation.engine.slot_memory import SlotMemory
from evaluation.engine.store.experts import ExpertStore

Checkpoint = Callable[..., Path]
MIB = 2**20
DEMAND = Demand(layers=4, num_experts=16, top_k=2, slot_bytes=MIB)
NEEDS = Needs(layers=4, kv_bytes_per_token=4000, row_bytes=20_000, mask_bytes=5)


def divided(budget: int | str, **changes: Any) -> Division:
    options: dict[str, Any] = {
        "demand": DEMAND, "needs": NEEDS, "resident_bytes": 10 * MIB, "reader_bytes": 6 * MIB, "reads_in_flight": 4,
        "context_tokens": 100, "scope": "global",
    }  # fmt: skip
    return divide(budget, **{**options, **changes})


def spent(division: Division) -> int:
    parts = (division.resident_bytes, division.buffer_bytes, division.kv_bytes, division.activation_bytes)
    return sum(parts) + division.expert_bytes


@pytest.mark.parametrize("scope", ["global", "per_layer"])
def test_experts_get_what_the_rest_leaves(scope: str) -> None:
    for budget_bytes in range(60 * MIB, 100 * MIB, 700_001):
        division = divided(budget_bytes, scope=scope)
        step_bytes = 2 * division.pools * MIB  # one more slot, and perhaps one for experts that pass through
        assert spent(division) <= budget_bytes < spent(division) + step_bytes


def test_experts_never_get_more_than_there_are() -> None:
    assert divided(10**10).slots == 64
    assert divided(10**10, scope="per_layer").slots == 16


@pytest.mark.parametrize("scope", ["global", "per_layer"])
def test_the_smallest_budget_that_is_named_works_and_less_does_not(scope: str) -> None:
    with pytest.raises(UserError, match=r"the smallest that works is (\d+\.?\d*)MiB") as refusal:
        divided(30 * MIB, scope=scope)
    smallest_bytes = int(float(str(refusal.value).split()[-1].removesuffix("MiB")) * MIB)
    assert divided(smallest_bytes, scope=scope).slots == 2
    with pytest.raises(UserError, match="is too small: the model without its experts takes 10MiB, 100 tokens"):
        divided(smallest_bytes - MIB // 5, scope=scope)


def slots_beside(division: Division, **call: int) -> int:
    return division.slots_with(division.spare_bytes(Call(**call)))


def test_a_growing_context_takes_slots_and_is_refused_when_there_are_none_left() -> None:
    division = divided(SLACK_BYTES + 40 * MIB)
    assert slots_beside(division, batch=1, rows=100, context_tokens=100) == division.slots, "what was announced is free"
    assert slots_beside(division, batch=1, rows=1, context_tokens=101) == division.slots, (
        "a prompt's memory is free by now"
    )
    last = division.slots
    for tokens in range(100, 4000, 50):
        slots = slots_beside(division, batch=1, rows=1, context_tokens=tokens)
        assert division.smallest_slots <= slots <= last
        lent_bytes = (division.slots - slots) * MIB + division.budget_bytes - spent(division)
        needed_bytes = NEEDS.kv_bytes(tokens) + NEEDS.activation_bytes(rows=1, context_tokens=tokens)
        assert needed_bytes <= division.kv_bytes + division.activation_bytes + lent_bytes
        last = slots
    with pytest.raises(UserError, match=r"2 x 100000 tokens need .*; shorten the request, or give \d"):
        slots_beside(division, batch=2, rows=2, context_tokens=100_000)


def test_the_budget_a_refusal_names_is_enough() -> None:
    division = divided(SLACK_BYTES + 30 * MIB)
    with pytest.raises(UserError, match="or give") as refusal:
        slots_beside(division, batch=1, rows=1, context_tokens=10_000)
    named_bytes = int(float(str(refusal.value).split()[-1].removesuffix("MiB")) * MIB)
    assert slots_beside(divided(named_bytes), batch=1, rows=1, context_tokens=10_000) >= 2


def test_slots_for_passing_experts_grow_with_the_pool_up_to_the_reads_in_flight() -> None:
    assert [passing_slots(slots, 4) for slots in (1, 8, 16, 31, 32, 1000)] == [1, 1, 2, 3, 4, 4]


def generate(model: Any, tokens: int, new_tokens: int) -> torch.Tensor:
    ids_BT = torch.randint(2, 258, (1, tokens), generator=torch.Generator().manual_seed(tokens))
    output: torch.Tensor = model.generate(
        input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=new_tokens, do_sample=False
    )
    return output


def test_tokens_stay_those_of_the_resident_model_while_slots_come_and_go(checkpoint: Checkpoint) -> None:
    folder = checkpoint("qwen2_moe", "float32")
    expected = [generate(AutoModelForCausalLM.from_pretrained(folder), tokens, 24) for tokens in (5, 60, 5)]
    with load(folder, EngineOptions(memory_budget="200MiB", context_tokens=8)) as (model, engine):
        assert engine.division is not None
        first = engine.cache.slots
        assert first == engine.demand.all_experts
        # a token as dear as a few experts, so that slots must go while the context grows
        dear = Needs(layers=4, kv_bytes_per_token=3 * engine.demand.slot_bytes // 10, row_bytes=0, mask_bytes=0)
        engine.division = replace(engine.division, needs=dear, activation_bytes=SLACK_BYTES, kv_bytes=dear.kv_bytes(8))
        engine.division = replace(engine.division, budget_bytes=spent(engine.division))  # nothing is left over
        found, slots = [], []
        model.register_forward_hook(lambda *_: slots.append(engine.cache.total_slots))
        for tokens in (5, 60, 5):
            found.append(generate(model, tokens, 24))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert min(slots) < first - 10
    assert slots[:3] == [first] * 3
    assert slots[48:51] == [first] * 3, "the third request has them back"


def test_a_context_that_does_not_fit_is_refused_and_the_next_request_works(checkpoint: Checkpoint) -> None:
    folder = checkpoint("olmoe")
    expected = generate(AutoModelForCausalLM.from_pretrained(folder, dtype="auto"), 9, 6)
    with load(folder, EngineOptions(memory_budget="200MiB", context_tokens=16)) as (model, engine):
        assert engine.division is not None
        dear = replace(engine.division.needs, kv_bytes_per_token=2**20)
        engine.division = replace(engine.division, needs=dear, kv_bytes=dear.kv_bytes(16))
        engine.division = replace(engine.division, budget_bytes=spent(engine.division))  # nothing is left over
        with pytest.raises(UserError, match=r"1 x 40 tokens need .* shorten the request"):
            generate(model, 40, 6)
        assert torch.equal(generate(model, 9, 6), expected)


def test_residents_are_worked_out_so_that_every_start_agrees_and_cover_what_loading_takes(
    checkpoint: Checkpoint,
) -> None:
    found, folder = [], checkpoint("olmoe")  # which takes memory too, when it is made
    for _ in range(2):
        before_bytes = private_bytes()
        with load(folder, EngineOptions(memory_budget="smallest", context_tokens=16)) as (model, engine):
            assert engine.division is not None
            weights_bytes = sum(parameter.nbytes for parameter in model.parameters() if not parameter.is_meta)
            assert engine.division.resident_bytes > weights_bytes > 0
            assert private_bytes() - before_bytes < engine.division.budget_bytes
            found.append(engine.division)
    assert found[0] == found[1]


def test_a_budget_may_be_in_parts_of_the_smallest_that_works() -> None:
    smallest = divided("smallest")
    assert smallest.slots == smallest.smallest_slots == DEMAND.top_k
    assert spent(smallest) == smallest.budget_bytes
    larger = divided("smallest + 12.5%")
    assert larger.budget_bytes == math.ceil(smallest.budget_bytes * 1.125)
    assert larger.slots > smallest.slots


def test_memory_of_slots_that_make_room_goes_back_to_the_system(checkpoint: Checkpoint) -> None:
    memory = SlotMemory(ExpertStore(checkpoint("olmoe")), 4096, torch.float32)
    before_bytes, all_bytes = private_bytes(), 4096 * memory._records.record_bytes
    memory._records.memory[:] = 1
    assert private_bytes() - before_bytes > 0.9 * all_bytes
    for slot in range(4096):
        memory.release(slot)
    assert private_bytes() - before_bytes < 0.5 * all_bytes, "neighbours share pages, so not all of it"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "give exactly one of expert_cache"),
        ({"expert_cache": "50%", "memory_budget": "1GiB"}, "give exactly one of expert_cache"),
        (
            {"memory_budget": "1MiB"},
            r"a memory budget of 1MiB is too small: .* the smallest that works is \d+\.?\d*MiB",
        ),
        ({"memory_budget": "lots"}, "memory budget 'lots' is not understood"),
    ],
)
def test_budgets_that_cannot_be_are_refused(checkpoint: Checkpoint, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words), load(checkpoint("olmoe"), EngineOptions(**options)):
        pass
