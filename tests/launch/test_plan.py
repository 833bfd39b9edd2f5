"""`remoe plan`: parts add up to the budget, predictions follow the trace, mistakes are named."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from configs.load import UserError
from evaluation.engine.cache.replay import replay
from evaluation.engine.cache.trace import RouteTrace
from evaluation.engine.greedy import decode
from evaluation.engine.loading import load
from evaluation.engine.options import EngineOptions
from evaluation.engine.sessions.plan import plan
from evaluation.engine.store.bandwidth import ReadBandwidth
from launch.plan import main, show

Checkpoint = Callable[..., Path]


@pytest.fixture(autouse=True)
def known_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A calibration takes two seconds and is tested elsewhere."""
    monkeypatch.setattr("evaluation.engine.sessions.plan.calibrated", lambda _: ReadBandwidth(4, 1e9))


@pytest.fixture
def trace(checkpoint: Checkpoint) -> RouteTrace:
    with load(checkpoint("qwen2_moe"), EngineOptions("100%", record_trace=True)) as (model, engine):
        decode(model, engine, prompt_ids=list(range(5, 25)), max_new_tokens=30)
        return engine.trace()


def planned(folder: Path, **options: Any) -> dict[str, Any]:
    return plan(str(folder), prompt_ids=[5, 6, 7, 8], **{"memory_budget": "100MiB", "context_tokens": 64, **options})


def test_the_parts_fill_the_budget_or_hold_every_expert(checkpoint: Checkpoint) -> None:
    folder = checkpoint("qwen2_moe")
    with load(folder, EngineOptions(memory_budget="100MiB", context_tokens=64)) as (_, engine):
        assert engine.division is not None
        fixed = engine.division.budget_bytes - engine.division.expert_bytes
    for memory_budget in ("100MiB", "200MiB"):
        division = planned(folder, memory_budget=memory_budget)["division"]
        parts = ("resident_bytes", "buffer_bytes", "kv_bytes", "activation_bytes", "expert_cache_bytes")
        assert sum(division[part] for part in parts) <= division["budget_bytes"]
        assert division["slots"] == 36, "there are no more experts"
    assert fixed > 0


def test_times_are_measured_on_the_engine(checkpoint: Checkpoint) -> None:
    measured = planned(checkpoint("qwen2_moe"))["measured"]
    assert measured["prompt_tokens"] == 4
    assert measured["compute_ms"] == pytest.approx(measured["tpot_ms"] - measured["stall_ms"])
    assert 0 < measured["compute_ms"] <= measured["tpot_ms"] < measured["ttft_ms"] * 1000


def test_other_sizes_are_predicted_from_the_trace(checkpoint: Checkpoint, trace: RouteTrace) -> None:
    found = planned(checkpoint("qwen2_moe"), trace=trace)
    assert len(found["sizes"]) >= 4
    for point in found["sizes"]:
        direct = replay(trace, policy="lru", cache_scope="global", slots=point["slots"])
        assert point["misses_per_token"] == pytest.approx(direct.decode.misses / 29)
        assert point["bytes_read_per_token"] == pytest.approx(direct.bytes_read_per_token)
        expected_ms = found["measured"]["compute_ms"] + point["bytes_read_per_token"] / 1e6
        assert point["expected_tpot_ms"] == pytest.approx(expected_ms)
    first, second = found["sizes"][:2]
    gained = first["expected_tpot_ms"] - second["expected_tpot_ms"]
    more_mib = (second["expert_cache_bytes"] - first["expert_cache_bytes"]) / 2**20
    assert second["saved_ms_per_mib"] == pytest.approx(gained / more_mib)


def test_the_command_prints_the_division_and_writes_all_numbers(
    checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "plan.json"
    main(
        [
            "--model",
            str(checkpoint("olmoe")),
            "--memory-budget",
            "100MiB",
            "--context-tokens",
            "64",
            "--output",
            str(output),
        ]
    )
    written = json.loads(output.read_text())
    assert written["division"]["budget_bytes"] == 100 * 2**20
    printed = capsys.readouterr().out
    for words in ("resident weights", "KV cache", "24 of 24 experts", "TTFT", "TPOT"):
        assert words in printed


def test_a_budget_below_one_tokens_demand_is_said(checkpoint: Checkpoint) -> None:
    found = planned(checkpoint("olmoe"))
    found["division"]["expert_cache_bytes"] = found["demand"]["token_demand_bytes"] - 1
    console = Console(file=io.StringIO(), width=200)
    show(found, console)
    assert "this budget is below it" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_trace_of_another_model_is_refused(checkpoint: Checkpoint, trace: RouteTrace) -> None:
    with pytest.raises(UserError, match=r"the trace has 3 MoE layers of 13 experts, .* has 3 of 12"):
        planned(checkpoint("qwen2_moe"), trace=replace(trace, num_experts=13))


def test_a_budget_that_is_too_small_names_the_smallest_that_works(checkpoint: Checkpoint) -> None:
    with pytest.raises(UserError, match=r"the smallest that works is \d"):
        planned(checkpoint("olmoe"), memory_budget="1MiB")


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "remoe plan --model data/embedded/model --memory-budget" in capsys.readouterr().out
