"""The controller's prediction against a plain count; memory follows the workload, and the total stays."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation.engine.cache.replay import replay
from evaluation.engine.engine import Engine
from evaluation.engine.loading import load
from evaluation.engine.options import EngineOptions
from evaluation.engine.sessions import controller as memory_controller
from evaluation.engine.sessions.controller import EVERY, MemoryController
from evaluation.engine.sessions.conversations import Conversations
from evaluation.engine.sessions.workload import ChatRequest, serve_all
from tests.evaluation.engine.memory.made_budgets import budget_for

Checkpoint = Callable[..., Path]
BLOCK = 8


@contextmanager
def divided(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, *, miss: float, token: float) -> Iterator[
    tuple[Conversations, Engine, MemoryController]
]:  # fmt: skip
    """A model with room for two thirds of its experts, or for kept blocks; times are given instead of measured."""
    monkeypatch.setattr(memory_controller._Times, "miss_seconds", np.array([miss, miss]))
    monkeypatch.setattr(memory_controller._Times, "prompt_token_seconds", token)
    monkeypatch.setattr(memory_controller._Times, "request_seconds", 1.0)
    folder = checkpoint("qwen2_moe")
    budget_bytes = budget_for(folder, experts=24)
    with load(folder, EngineOptions(memory_budget=budget_bytes, context_tokens=64, cache_policy="lru")) as (
        model,
        engine,
    ):
        chat = Conversations(model, engine.keep_prefixes(4096), block_tokens=BLOCK)
        yield chat, engine, MemoryController(engine, chat)


def conversations(count: int, *, turns: int, seed: int = 0) -> list[ChatRequest]:
    draw = torch.Generator().manual_seed(seed)
    texts = [torch.randint(2, 258, (2 * BLOCK + 3,), generator=draw).tolist() for _ in range(count)]
    requests = []
    for _ in range(turns):
        for text in texts:
            requests.append(ChatRequest(list(text), 2))
            text += torch.randint(2, 258, (BLOCK,), generator=draw).tolist()
    return requests


def serve(chat: Conversations, controller: MemoryController, requests: list[ChatRequest]) -> None:
    for request in requests:
        serve_all(chat, [request])
        controller.request_done()


def test_the_prediction_is_a_plain_count(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    with divided(checkpoint, monkeypatch, miss=0.5, token=0.25) as (chat, engine, controller):
        monkeypatch.setattr(controller, "decide", lambda: None)
        requests = conversations(3, turns=2)
        serve(chat, controller, requests)
        seconds = controller.seconds_by_blocks()
        trace = engine.recent_routing(100)
        assert trace is not None
        assert seconds is not None
        warm = trace.as_one_request()
        division, block_bytes = controller._division, chat.kept.block_bytes
        assert block_bytes is not None
        spare = division.shared_bytes
        assert len(seconds) == spare // block_bytes + 1
        # two blocks in every first turn, three in the second; between two turns of one come the others' blocks
        for blocks in {0, 1, 2, 5, 6, 7, 8, len(seconds) - 1} & set(range(len(seconds))):
            slots = division.slots_with(spare - blocks * block_bytes)
            misses = replay(warm, policy="lru", cache_scope="global", slots=slots).misses
            expected = (0.5 * misses + 0.25 * BLOCK * _lacking(blocks)) / len(requests)
            assert seconds[blocks] == pytest.approx(expected)


def _lacking(blocks: int) -> int:
    """Blocks of the second turns that a cache of so many does not hold; conversation i finds i's two blocks deep below."""
    order = [(i, block) for i in (2, 1, 0) for block in (0, 1)]  # most recent first, after the first turns
    lacking = 0
    for i in range(3):
        lacking += sum(order.index((i, block)) + 1 > blocks for block in (0, 1))
        order = [(i, 0), (i, 1), (i, 2), *(one for one in order if one[0] != i)]
    return lacking


def test_memory_follows_the_workload_and_the_total_stays(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    with divided(checkpoint, monkeypatch, miss=1.0, token=10.0) as (chat, engine, controller):
        division = engine.division
        assert division is not None
        serve(chat, controller, conversations(4, turns=1))
        assert chat.kept.block_bytes is not None
        serve(chat, controller, conversations(4, turns=4))
        many = chat.kept.capacity_bytes
        assert many >= 8 * chat.kept.block_bytes, "conversations that come back are kept"
        before = chat.found_tokens
        serve(chat, controller, conversations(4, turns=5)[-4:])
        assert chat.found_tokens > before
        for seed in range(1, 1 + memory_controller.BLOCK_REQUESTS // EVERY):
            serve(chat, controller, conversations(EVERY, turns=1, seed=seed))
            spare = division.spare_bytes(engine._call)
            held = chat.kept.held_bytes + (engine.cache.total_slots - division.smallest_slots) * division.step_bytes
            assert held <= spare
        assert chat.kept.capacity_bytes < many, "nobody comes back: experts get it"


def test_kept_blocks_are_not_given_up_before_enough_requests_have_shown_what_comes_back(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_controller, "BLOCK_REQUESTS", 2 * EVERY)
    with divided(checkpoint, monkeypatch, miss=1.0, token=10.0) as (chat, _, controller):
        serve(chat, controller, conversations(EVERY, turns=1))
        seconds = controller.seconds_by_blocks()
        assert seconds is not None
        assert seconds.argmin() == 0, "so far nobody has come back"
        assert chat.kept.capacity_bytes == 4096
        serve(chat, controller, conversations(EVERY, turns=1, seed=1))
        assert chat.kept.capacity_bytes == 0


def test_memory_does_not_move_for_little(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    with divided(checkpoint, monkeypatch, miss=1e-9, token=1e-9) as (chat, _, controller):
        serve(chat, controller, conversations(4, turns=4))
        assert controller.seconds_by_blocks() is not None
        assert chat.kept.capacity_bytes == 4096
