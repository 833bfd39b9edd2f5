"""The prediction for every division is what the engine really does with it; workloads are read or refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from configs.load import UserError
from evaluation.engine.loading import load
from evaluation.engine.options import EngineOptions
from evaluation.engine.sessions.conversations import Conversations
from evaluation.engine.sessions.workload import (
    SHARES,
    ChatRequest,
    Rates,
    read_requests,
    run_once,
    serve_all,
    splits,
)
from launch.plan import main as plan
from tests.evaluation.engine.memory.made_budgets import budget_for

Checkpoint = Callable[..., Path]
BLOCK = 8
BUDGET: dict[str, Any] = {"memory_budget": "400MiB", "context_tokens": 64}


@pytest.fixture
def tight(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Two thirds of the experts, and less for every kept block."""
    return {**BUDGET, "memory_budget": budget_for(checkpoint("qwen2_moe"), experts=24)}


def requests() -> list[ChatRequest]:
    """Three conversations, two turns each; one prompt ends with a block and comes back, one is shorter than a block."""
    texts = [list(range(2, 21)), list(range(30, 46)), [*range(2, 11), *range(60, 70)]]
    first = [ChatRequest(text, 3) for text in texts]
    second = [ChatRequest([*text, *range(100, 100 + 9 + i)], 3) for i, text in enumerate(texts)]
    return [*first, ChatRequest([5, 6], 2), *second, first[1]]


def test_every_division_does_what_was_predicted(checkpoint: Checkpoint, tight: dict[str, Any]) -> None:
    folder = checkpoint("qwen2_moe")
    with load(folder, EngineOptions(**tight)) as (model, engine):
        workload = run_once(model, engine, requests(), block_tokens=BLOCK)
        predicted = splits(workload, engine, policy="decayed")
        assert engine.division is not None
        division = engine.division
    assert [split.prefix_cache_bytes for split in predicted] == [
        int(share * division.shared_bytes) // workload.block_bytes * workload.block_bytes for share in SHARES
    ]
    prompt_tokens = sum(len(request.token_ids) for request in requests())
    for split in predicted:
        with load(folder, EngineOptions(**tight)) as (model, engine):
            chat = Conversations(model, engine.keep_prefixes(split.prefix_cache_bytes), block_tokens=BLOCK)
            for request in requests():
                serve_all(chat, [request])
                held_bytes = (
                    engine.cache.total_slots - division.smallest_slots
                ) * division.step_bytes + chat.kept.held_bytes
                assert held_bytes <= division.shared_bytes
        assert (chat.found_tokens, chat.computed_tokens) == (split.found_tokens, split.computed_tokens)
        assert split.found_tokens + split.computed_tokens == prompt_tokens
        assert split.slots == division.slots_with(division.shared_bytes - split.prefix_cache_bytes)
    assert predicted[0].found_tokens == 0
    assert predicted[-1].found_tokens == max(split.found_tokens for split in predicted) > 0
    assert [split.slots for split in predicted] == sorted({split.slots for split in predicted}, reverse=True)
    assert predicted[-1].slots == division.smallest_slots
    assert predicted[-1].misses > min(split.misses for split in predicted), "too few experts cost more than they save"


def test_the_prediction_without_kept_blocks_is_the_run_itself(checkpoint: Checkpoint) -> None:
    with load(checkpoint("qwen2_moe"), EngineOptions(**BUDGET)) as (model, engine):
        workload = run_once(model, engine, requests(), block_tokens=BLOCK)
        stats = engine.stats()
        nothing_kept = splits(workload, engine, policy="decayed")[0]
    measured = sum(stats.seconds.values())
    cold = nothing_kept.misses - stats.misses  # the run began warmed up
    assert 0 <= cold <= engine.demand.all_experts
    spent = measured + cold * max(workload.rates.miss_seconds)
    assert measured <= nothing_kept.expected_seconds <= spent * (1 + 1e-9)


def test_a_workload_without_a_whole_block_is_refused(checkpoint: Checkpoint) -> None:
    with (
        load(checkpoint("qwen2_moe"), EngineOptions(**BUDGET)) as (model, engine),
        pytest.raises(UserError, match="no prompt of the workload has 100 tokens"),
    ):
        run_once(model, engine, requests(), block_tokens=100)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "does not exist; write one request per line"),
        ("", "is empty"),
        ('{"prompt": "a", "max_tokens": 2}\n{"prompt": "a"}', "line 2: KeyError"),
        ("[1]", "line 1: TypeError"),
        ("{", "line 1: JSONDecodeError"),
        ('{"prompt": "", "max_tokens": 2}', "line 1: a prompt is text and max_tokens at least 1"),
        ('{"prompt": "a", "max_tokens": true}', "line 1: a prompt is text"),
        ('{"prompt": "a", "max_tokens": 0}', "line 1: a prompt is text"),
    ],
)
def test_what_is_no_workload_is_refused(checkpoint: Checkpoint, tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "chats.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=words):
        read_requests(path, AutoTokenizer.from_pretrained(checkpoint("qwen2_moe")))


def test_plan_prints_and_writes_every_division(
    checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output = tmp_path / "chats.jsonl", tmp_path / "plan.json"
    path.write_text('{"prompt": "one two three four", "max_tokens": 2}\n' * 2)
    flags = ["--memory-budget", "400MiB", "--context-tokens", "64", "--block-tokens", "8", "--output", str(output)]
    plan(["--model", str(checkpoint("qwen2_moe")), "--sessions", str(path), *flags])
    found = json.loads(output.read_text())["splits"]
    assert [split["found_tokens"] for split in found][::8] == [0, 16]
    printed = capsys.readouterr().out
    assert "16 of 36" in printed
    assert "best: --prefix-cache" in printed


def test_tokens_and_misses_cost_what_they_took() -> None:
    rates = Rates(token_seconds=(2.0, 3.0), miss_seconds=(0.5, 0.25))
    assert rates.seconds(tokens=(10, 1), misses=(4, 8)) == 20 + 3 + 2 + 2
    many = rates.seconds(tokens=(np.array([10, 0]), 1), misses=np.array([[4, 0], [8, 4]]))
    assert many.tolist() == [27.0, 4.0]
