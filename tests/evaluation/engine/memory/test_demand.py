"""Sizes as people write them, the smallest cache that works, and the warning below the cliff."""

import logging

import pytest

from configs.load import UserError
from evaluation.engine.memory.demand import Demand, budget_bytes, slots_for, warn_below_cliff
from evaluation.engine.memory.process import total_memory_bytes

DEMAND = Demand(layers=4, num_experts=8, top_k=2, slot_bytes=1000)


def test_slots_never_exceed_the_experts() -> None:
    assert slots_for(10**9, DEMAND, scope="global") == 32
    assert slots_for(10**9, DEMAND, scope="per_layer") == 8
    assert slots_for(5999, DEMAND, scope="global") == 5


@pytest.mark.parametrize(("scope", "smallest"), [("global", 2000), ("per_layer", 8000)])
def test_the_smallest_budget_named_is_the_smallest_that_works(scope: str, smallest: int) -> None:
    with pytest.raises(UserError, match=f"too small.*the smallest that works is {smallest} bytes"):
        slots_for(smallest - 1, DEMAND, scope=scope)
    assert slots_for(smallest, DEMAND, scope=scope) == 2


@pytest.mark.parametrize(("slots", "words"), [(6, "hits nothing"), (7, "hits little")])
def test_below_one_tokens_demand_a_warning_names_what_helps(
    slots: int, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        warn_below_cliff(slots, DEMAND, scope="global", policy="lru")
    assert len(caplog.messages) == 1
    assert words in caplog.messages[0]
    assert "at least 7.9KiB" in caplog.messages[0]


@pytest.mark.parametrize(
    ("slots", "scope", "policy"), [(8, "global", "lru"), (2, "per_layer", "lru"), (2, "global", "lfu")]
)
def test_no_warning_where_there_is_no_cliff(
    slots: int, scope: str, policy: str, caplog: pytest.LogCaptureFixture
) -> None:
    warn_below_cliff(slots, DEMAND, scope=scope, policy=policy)
    assert not caplog.messages


def test_a_share_is_of_what_the_process_may_hold(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    machine_bytes = total_memory_bytes()
    monkeypatch.setattr("evaluation.engine.memory.process.memory_limit", lambda: 500 * 2**20)
    assert budget_bytes("50%", smallest_bytes=1) == 250 * 2**20
    assert not caplog.messages
    assert budget_bytes("1GiB", smallest_bytes=1) == 2**30
    assert caplog.messages == ["a memory budget of 1GiB is more than the 500MiB there are"]
    monkeypatch.setattr("evaluation.engine.memory.process.memory_limit", lambda: 2 * machine_bytes)
    assert total_memory_bytes() >= machine_bytes
