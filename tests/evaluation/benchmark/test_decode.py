"""`remoe bench decode`: sides take turns, whatever happens to one is told, and a real run is complete."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.load import UserError
from data.corpus import EMBEDDED
from evaluation.benchmark import decode as bench
from evaluation.benchmark.decode import DecodeBenchmark
from evaluation.benchmark.made_model.made_checkpoint import Recipe, write_checkpoint
from evaluation.benchmark.made_model.synthetic import Shape
from evaluation.benchmark.order import COLD, LONG, WARM, Order
from evaluation.benchmark.processes import Limits, SideRun
from evaluation.benchmark.sides import contenders
from evaluation.benchmark.sides.side import open_side
from training.model.loading import load_tokenizer

FIGURES = {
    "hit_rate": {"prefill": 0.1, "decode": 0.5}, "reuse_rate_mean": 0.35, "misses_per_token": 3.0, "first_touches": 9,
    "counted_bytes_read_per_token": 1.2e4, "missed_bytes_per_token": 1e4,
    "stall_seconds": {"prefill": 0.0, "decode": 0.01}, "reading_seconds": {"prefill": 0.0, "decode": 0.008},
    "expert_bytes": 1000,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shapes of a made model are enough where no side really runs."""
    shape = Shape(hidden=128, layers=2, num_experts=8, top_k=2, intermediate=16, shared_intermediate=16,
                  vocabulary=4096, context=512)  # fmt: skip
    folder = tmp_path_factory.mktemp("bench_model")
    write_checkpoint(folder, Recipe(shape, 0.5, 0, "bfloat16"), load_tokenizer(str(EMBEDDED / "tokenizer")))
    return folder


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, Order]]:
    """No process is started: every side takes 10 ms a token, but accelerate is killed. What was asked is listed."""
    asked: list[tuple[str, int, Order]] = []

    def run_side(order: Order, limits: Limits, *, contender: str, repeat: int) -> SideRun:
        asked.append((contender, repeat, order))
        if order.side == "accelerate" and repeat >= 0:
            return SideRun(contender, repeat, limits.memory_bytes, failure="killed by the kernel")
        legs = {
            leg.name: {
                "token_ids": [1, 2], "ttft_ms": 50.0, "tpot_ms": None if leg.name == LONG else 10.0, "itl_ms": [10.0],
                "output_throughput": 20.0, "bytes_read_per_token": 1e6,
                "engine": FIGURES if order.side == "remoe" else None,
            }
            for leg in order.legs
        }  # fmt: skip
        return SideRun(
            contender, repeat, limits.memory_bytes, legs=legs, settings={"threads": 1}, peak_rss_bytes=1 << 20
        )

    monkeypatch.setattr(bench, "run_side", run_side)
    monkeypatch.setattr(contenders, "run_side", run_side)
    monkeypatch.setattr(
        bench, "_bandwidth", lambda *_: {"read_bytes": 4096, "direct": True, "read_by_depth": {1: 1e9}, "read": 1e9,
                                         "read_beside_products": 9e8, "memory": 1e10}
    )  # fmt: skip
    before_and_after = itertools.cycle([5e8, 1.5e9])  # their mean counts
    monkeypatch.setattr(bench, "_read_rate", lambda _: next(before_and_after))
    return asked


def options(model: Path, tmp_path: Path, **changed: Any) -> DecodeBenchmark:
    usual = {
        "model": str(model), "expert_cache": "30%,60%", "max_new_tokens": 8, "long_prompt_tokens": 100, "repeats": 2,
        "work_dir": str(tmp_path / "work"), "output": str(tmp_path / "bench.json"),
    }  # fmt: skip
    return DecodeBenchmark(**{**usual, **changed})


def test_sides_take_turns_and_failures_are_told(
    model: Path, tmp_path: Path, ran: list[tuple[str, int, Order]], capsys: pytest.CaptureFixture[str]
) -> None:
    bench.benchmark(options(model, tmp_path, against="accelerate,resident", against_new_tokens=4))
    names = ["remoe 30%", "remoe 60%", "accelerate", "resident"]
    assert [(name, repeat) for name, repeat, _ in ran] == [
        *((name, 0) for name in names),
        *((name, 1) for name in [*names[1:], names[0]]),
    ]
    by_side = {order.side: order for _, _, order in ran}
    assert [leg.name for leg in by_side["remoe"].legs] == [COLD, WARM, LONG]
    assert [len(leg.prompt_ids) for leg in by_side["remoe"].legs] == [64, 64, 100]
    assert [(leg.name, leg.max_new_tokens) for leg in by_side["accelerate"].legs] == [(COLD, 4), (WARM, 4)]
    assert [leg.max_new_tokens for leg in by_side["resident"].legs] == [8, 8, 1]
    result = json.loads((tmp_path / "bench.json").read_text())
    assert result["summary"]["accelerate"]["failures"] == ["killed by the kernel"]
    assert result["ratios"]["resident"]["remoe 30%"]["cold"]["mean_tpot_ms_ratio"]["median"] == 1
    assert result["ratios"]["accelerate"]["remoe 30%"]["cold"]["mean_tpot_ms_ratio"] is None
    assert result["bounds"]["remoe 60%"]["long_prompt"]["ratio"]["median"] == pytest.approx(50 / (50 + 0.009))
    assert len(result["runs"]) == 8
    printed = capsys.readouterr().out
    assert "accelerate FAILED: killed by the kernel" in printed
    assert "100.0" in printed
    told = [line for line in printed.splitlines() if line.startswith("repeat ")]
    assert len(told) == 8
    assert told[0] == "repeat 1, remoe 30%: TPOT cold 10.0\N{NO-BREAK SPACE}ms, warm 10.0\N{NO-BREAK SPACE}ms"
    assert told[2] == "repeat 1, accelerate: killed by the kernel"


def test_budgets_for_everything_take_part(model: Path, tmp_path: Path, ran: list[tuple[str, int, Order]]) -> None:
    budgets = {"expert_cache": "", "memory_budget": "40MiB,60MiB"}
    bench.benchmark(options(model, tmp_path, **budgets, repeats=1, against="accelerate"))
    assert [(name, order.memory_budget, order.expert_cache) for name, _, order in ran[:2]] == [
        ("remoe 40MiB for all", "40MiB", None), ("remoe 60MiB for all", "60MiB", None),
    ]  # fmt: skip
    assert ran[2][2].resident_bytes == 40 * 2**20, "accelerate keeps as much"
    assert set(json.loads((tmp_path / "bench.json").read_text())["bounds"]) == {name for name, _, _ in ran[:2]}


def test_reading_ahead_takes_part_beside_not_doing_it(
    model: Path, tmp_path: Path, ran: list[tuple[str, int, Order]]
) -> None:
    bench.benchmark(options(model, tmp_path, repeats=1, against="", prefetch="0,3"))
    assert [(name, order.prefetch) for name, _, order in ran] == [
        ("remoe 30%", 0), ("remoe 30%, prefetch 3", 3), ("remoe 60%", 0), ("remoe 60%, prefetch 3", 3),
    ]  # fmt: skip


def test_a_lever_takes_part_beside_not_having_one(
    model: Path, tmp_path: Path, ran: list[tuple[str, int, Order]]
) -> None:
    bench.benchmark(options(model, tmp_path, expert_cache="30%", repeats=1, against="", lever="prior:delta=0"))
    assert [(name, order.lever) for name, _, order in ran] == [
        ("remoe 30%", None), ("remoe 30%, prior:delta=0", "prior:delta=0"),
    ]  # fmt: skip


def test_packed_products_are_asked_of_our_engine(
    model: Path, tmp_path: Path, ran: list[tuple[str, int, Order]]
) -> None:
    bench.benchmark(options(model, tmp_path, expert_cache="30%", repeats=1, against="", products="packed"))
    assert [order.products for _, _, order in ran] == ["packed"]
    with (
        pytest.raises(UserError, match="its experts are not quantised"),
        open_side(replace(ran[0][2], threads=torch.get_num_threads())),
    ):
        pass


@pytest.mark.parametrize(("limit", "repacks"), [(None, True), (1249, False), (1250, True)])
def test_llamacpp_copies_quantised_weights_where_that_fits(
    tmp_path: Path, limit: int | None, repacks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf = tmp_path / "g"
    gguf.write_bytes(bytes(1000))
    monkeypatch.setattr(contenders, "_write_gguf", lambda *_: None)
    base = Order("", str(tmp_path), [], 1)
    found = contenders.opponent("llamacpp", base, Limits(1, limit), work_dir=tmp_path, gguf=gguf, ours=base)
    assert found.order.repacks == repacks


def test_repeats_use_other_prompts(model: Path, tmp_path: Path, ran: list[tuple[str, int, Order]]) -> None:
    bench.benchmark(options(model, tmp_path, against=""))
    prompts = {tuple(leg.prompt_ids) for _, _, order in ran for leg in order.legs}
    assert len(prompts) == 6


def test_a_long_prompt_that_does_not_fit_is_left_out_and_told(
    model: Path, tmp_path: Path, ran: list[tuple[str, int, Order]]
) -> None:
    bench.benchmark(options(model, tmp_path, against="", long_prompt_tokens=512))
    assert LONG not in [leg.name for leg in ran[0][2].legs]
    notes = json.loads((tmp_path / "bench.json").read_text())["notes"]
    assert any("no long prompt: 512 tokens" in note for note in notes)


def test_a_model_llamacpp_cannot_have_is_told(
    tmp_path: Path, ran: list[tuple[str, int, Order]], model_dir: Callable[[str], Path]
) -> None:
    small = {"expert_cache": "50%", "max_new_tokens": 2, "prompt_tokens": 8, "repeats": 1, "long_prompt_tokens": 0}
    to = {"against": "llamacpp", "work_dir": str(tmp_path), "output": str(tmp_path / "o")}
    bench.benchmark(DecodeBenchmark(model=str(model_dir("olmoe")), **small, **to))
    result = json.loads((tmp_path / "o").read_text())
    assert "is a olmoe model; only qwen2_moe" in result["summary"]["llamacpp"]["failures"][0]
    assert [name for name, _, _ in ran] == ["remoe 50%"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"against": "vllm"}, "--against 'vllm' is not known; write some of accelerate,llamacpp,resident"),
        ({"max_new_tokens": 1}, "--max-new-tokens 1 leaves nothing to time"),
        ({"against_new_tokens": 1}, "--against-new-tokens is 1; write at least 2"),
        ({"repeats": 0}, "--repeats is 0; write at least 1"),
        ({"expert_cache": ""}, "our engine needs a size: write --expert-cache 400MiB"),
        ({"lever": "prio"}, "lever 'prio' is not known"),
        ({"products": "fast"}, "--products 'fast' is not known; write exact or packed"),
        ({"prefetch": "some"}, "--prefetch 'some' is no list of numbers; write for example 3, or 0,3 for both"),
        ({"max_new_tokens": 500}, "do not fit the model's context of 512"),
        ({"memory_limit_cgroup": "25%"}, "--memory-limit-cgroup '25%' is not understood"),
    ],
)
def test_mistakes(
    model: Path, tmp_path: Path, more: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "_bandwidth", lambda *_: pytest.fail("something was measured"))
    with pytest.raises(UserError, match=words):
        bench.benchmark(options(model, tmp_path, **more))


def test_a_limit_needs_a_controller(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "find_hierarchy", lambda: None)
    with pytest.raises(UserError, match=r"needs a memory controller \(cgroup v1 or v2\)"):
        bench.benchmark(options(model, tmp_path, memory_limit_cgroup="1GiB"))


def test_accelerate_gets_less_memory_until_it_survives(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int | None] = []

    def run_side(order: Order, limits: Limits, *, contender: str, repeat: int) -> SideRun:
        tried.append(order.resident_bytes)
        return SideRun(contender, repeat, limits.memory_bytes, failure="killed" if len(tried) < 3 else None)

    monkeypatch.setattr(contenders, "run_side", run_side)
    found = contenders.opponent(
        "accelerate", Order("", str(model), [], 1), Limits(1, 2 << 30), work_dir=tmp_path, gguf=tmp_path / "g",
        ours=Order("remoe", str(model), [], 1, expert_cache="30%"),
    )  # fmt: skip
    assert tried == [(2048 - margin) << 20 for margin in (500, 700, 1000)]
    assert (found.order.resident_bytes, found.unable) == (1048 << 20, None)


@pytest.mark.slow
def test_a_real_run_is_complete(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="the bench extra is not installed")
    bench.benchmark(options(model, tmp_path, repeats=1, threads=1))
    result = json.loads((tmp_path / "bench.json").read_text())
    assert list(result["summary"]) == ["remoe 30%", "remoe 60%", "accelerate", "llamacpp", "resident"]
    for name, summary in result["summary"].items():
        assert not summary["failures"], name
        assert summary["legs"]["cold"]["mean_tpot_ms"]["n"] == 1
    assert result["equal_tokens"]["resident"]["remoe 30%"] == 1
    assert result["equal_tokens"]["accelerate"]["remoe 30%"] == 1
    assert result["bounds"]["remoe 30%"]["cold"]["share"]["median"] > 0
    assert result["bounds"]["remoe 30%"]["long_prompt"]["ratio"]["median"] > 0
