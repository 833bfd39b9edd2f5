"""Medians, ratios within repeats and bounds, by hand."""

from typing import Any

import pytest

from evaluation.benchmark.comparison import decode_bound, equal_tokens, prompt_bound, ratios, spread, summarise
from evaluation.benchmark.processes import SideRun


def leg(
    tpot_ms: float | None, ttft_ms: float = 100.0, tokens: tuple[int, ...] = (1, 2, 3), **engine: Any
) -> dict[str, Any]:
    return {
        "token_ids": list(tokens), "ttft_ms": ttft_ms, "tpot_ms": tpot_ms, "itl_ms": [tpot_ms] * 2 if tpot_ms else [],
        "output_throughput": 1.0, "bytes_read_per_token": 4.0, "engine": engine or None,
    }  # fmt: skip


def ours(tpot_ms: float, read: float) -> dict[str, Any]:
    return leg(
        tpot_ms, hit_rate={"decode": 0.5}, reuse_rate_mean=0.35, missed_bytes_per_token=read,
        counted_bytes_read_per_token=1.25 * read, stall_seconds={"decode": tpot_ms / 1e3},
        reading_seconds={"decode": 2 * 0.8 * tpot_ms / 1e3},
    )  # fmt: skip


def test_spread_leaves_out_what_was_not_measured() -> None:
    assert spread([3.0, None, 1.0, 8.0]) == {"median": 3.0, "least": 1.0, "most": 8.0, "n": 3}
    assert spread([None]) is None


def test_ratios_pair_the_same_repeat() -> None:
    runs = [
        SideRun("a", 0, None, legs={"cold": ours(10, 1)}), SideRun("b", 0, None, legs={"cold": leg(150)}),
        SideRun("b", 1, None, legs={"cold": leg(40)}), SideRun("a", 1, None, legs={"cold": ours(20, 1)}),
        SideRun("b", 2, None, legs={"cold": leg(1)}), SideRun("a", 2, None, failure="killed"),
    ]  # fmt: skip
    found = ratios(runs, of="b", to="a", leg="cold")
    assert found["mean_tpot_ms_ratio"] == {"median": 8.5, "least": 2.0, "most": 15.0, "n": 2}
    assert found["mean_ttft_ms_ratio"] == {"median": 1.0, "least": 1.0, "most": 1.0, "n": 2}
    assert ratios(runs, of="b", to="a", leg="warm")["mean_tpot_ms_ratio"] is None


def test_failures_are_in_the_summary_beside_what_was_measured() -> None:
    runs = [
        SideRun("a", 0, 9, peak_memory_bytes=5, legs={"cold": leg(10)}),
        SideRun("a", 1, 9, peak_memory_bytes=9, failure="killed by the kernel"),
        SideRun("b", 0, None, failure="package missing"),
    ]
    summary = summarise(runs)
    assert summary["a"]["legs"]["cold"]["mean_tpot_ms"] == {"median": 10, "least": 10, "most": 10, "n": 1}
    assert summary["a"]["failures"] == ["killed by the kernel"]
    assert (summary["a"]["peak_memory_bytes"], summary["a"]["limit_bytes"]) == (9, 9)
    assert summary["b"] == {
        "legs": {}, "limit_bytes": None, "peak_rss_bytes": None, "peak_memory_bytes": None, "load_seconds": None,
        "settings": {}, "failures": ["package missing"],
    }  # fmt: skip


def test_equal_tokens_count_up_to_the_first_difference() -> None:
    runs = [
        SideRun("a", 0, None, legs={"cold": leg(1, tokens=(1, 2, 3, 4)), "warm": leg(1, tokens=(5, 6))}),
        SideRun("b", 0, None, legs={"cold": leg(1, tokens=(1, 9, 3, 4)), "warm": leg(1, tokens=(5, 6, 7))}),
    ]
    assert equal_tokens(runs, of="a", to="b") == pytest.approx(3 / 6)
    assert equal_tokens(runs, of="a", to="c") is None


def test_the_bound_is_the_slower_of_disk_and_memory() -> None:
    runs = [
        SideRun("a", 0, None, read_rate=1000, legs={"cold": ours(200, 100.0)}),
        SideRun("a", 1, None, read_rate=2000, legs={"cold": ours(50, 20.0)}),
        SideRun("resident", 0, None, legs={"cold": leg(150.0)}),
        SideRun("a", 2, None, legs={"cold": ours(50, 20.0)}),  # the disk was not measured around it
    ]
    found = decode_bound(runs, "a", "cold", memory_rate=2000, active_bytes=40)
    assert found is not None
    assert found["memory_ms"] == 20
    assert found["bound_ms"] == {
        "median": 60,
        "least": 20,
        "most": 100,
        "n": 2,
    }  # 100 bytes at 1000 a second; 40 at 2000
    assert found["share"] == {"median": pytest.approx(0.45), "least": 0.4, "most": 0.5, "n": 2}
    assert found["share_with_resident"] == {"median": 0.75, "least": 0.75, "most": 0.75, "n": 1}, "150 of 200 ms"
    assert found["stall_share"]["median"] == pytest.approx(0.5)
    assert found["reading_share"]["median"] == pytest.approx(0.8)
    assert found["needed_share"]["median"] == pytest.approx(0.8)
    assert found["rate_share"]["most"] == pytest.approx(125 / 0.16 / 1000), "125 bytes in 160 ms of reading"
    assert found["rate_share"]["least"] == pytest.approx(25 / 0.04 / 2000)
    assert found["read_share"]["most"] == pytest.approx(0.8 * 0.8 * found["rate_share"]["most"])
    assert found["read_share"]["least"] == pytest.approx(0.8 * 0.8 * found["rate_share"]["least"])
    assert decode_bound(runs, "a", "warm", memory_rate=1, active_bytes=1) is None


def test_the_prompt_bound_adds_reading_and_resident_time() -> None:
    long = leg(None, ttft_ms=900.0, tokens=(1,), first_touches=3, expert_bytes=100)
    runs = [
        SideRun("a", 0, None, read_rate=1000, legs={"long_prompt": long}),
        SideRun("resident", 0, None, legs={"long_prompt": leg(None, ttft_ms=300.0)}),
    ]
    found = prompt_bound(runs, "a")
    assert found is not None
    assert found["expected_ms"]["median"] == pytest.approx(600)
    assert found["ratio"]["median"] == pytest.approx(1.5)
    assert prompt_bound(runs[:1], "a") is None
