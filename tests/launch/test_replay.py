"""`remoe replay`: the JSON that others read, and one message for each mistake."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from configs.load import UserError
from evaluation.engine.cache.replay import POLICIES, replay
from evaluation.engine.cache.trace import RouteTrace
from evaluation.engine.cache.trace_formats import read_trace, write_trace
from launch.replay import main


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    ids = np.stack([np.stack([generator.permutation(10)[:2] for _ in range(3)]) for _ in range(50)])
    tokens = np.arange(50)
    path = tmp_path / "t.safetensors"
    trace = RouteTrace(
        ids,
        phase=tokens * 0 + 1,
        request_id=tokens // 25,
        call=tokens,
        num_experts=10,
        layer_ids=(1, 2, 5),
        expert_bytes=64,
    )
    write_trace(trace, path)
    return path


def test_the_json_has_every_policy_and_size(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "r.json"
    main([str(trace), "--policy", "lru, belady", "--slots", "2,4", "--output", str(output)])
    report = json.loads(output.read_text())
    assert report["trace"] == str(trace)
    results = report["results"]
    assert [(r["policy"], r["slots"]) for r in results] == [("lru", 2), ("lru", 4), ("belady", 2), ("belady", 4)]
    by_name = {(r["policy"], r["slots"]): r for r in results}
    lru, belady = by_name["lru", 4], by_name["belady", 4]
    assert lru["cache_scope"] == "per_layer"
    assert lru["accesses"] == 50 * 3 * 2
    assert lru["hit_rate"] == pytest.approx(1 - lru["misses"] / lru["accesses"])
    assert lru["misses_without_first_touches"] == lru["misses"] - lru["first_touches"]
    assert lru["policy_regret"] == pytest.approx(lru["misses"] / belady["misses"])
    assert belady["policy_regret"] == 1
    assert [layer["layer"] for layer in lru["per_layer"]] == [1, 2, 5]
    assert sum(layer["misses"] for layer in lru["per_layer"]) == lru["misses"] == lru["decode"]["misses"]
    assert lru["prefill"]["hit_rate"] is None
    assert lru["bytes_read_per_token"] == pytest.approx(64 * lru["misses"] / 50)
    assert "belady" in capsys.readouterr().out


def test_regret_is_there_also_where_the_optimum_was_not_asked_for(trace: Path, tmp_path: Path) -> None:
    output = tmp_path / "r.json"
    main([str(trace), "--policy", "lru", "--cache-scope", "global,per_layer", "--slots", "7", "--output", str(output)])
    results = json.loads(output.read_text())["results"]
    assert [(row["policy"], row["cache_scope"]) for row in results] == [("lru", "global"), ("lru", "per_layer")]
    for row in results:
        best = replay(read_trace(trace), policy="belady", cache_scope=row["cache_scope"], slots=7)
        assert row["policy_regret"] == pytest.approx(row["misses"] / best.misses)
        assert row["policy_regret"] > 1


def test_lru_at_every_size_is_always_there(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "r.json"
    main([str(trace), "--output", str(output)])
    report = json.loads(output.read_text())
    assert report["results"] == []
    per_layer, one_pool = report["lru_curve"]["per_layer"], report["lru_curve"]["global"]
    assert [len(curve["misses"]) for curve in (per_layer, one_pool)] == [11, 31]
    for curve in (per_layer, one_pool):
        assert curve["smallest_slots"] == 2
        assert curve["misses"][0] == curve["accesses"] == curve["decode"]["accesses"] == 300
        assert curve["misses"][-1] == curve["first_touches"] == curve["decode"]["first_touches"]
        assert curve["prefill"] == {"accesses": 0, "first_touches": 0, "misses": [0] * len(curve["misses"])}
    read = read_trace(trace)
    direct = replay(read, policy="lru", cache_scope="per_layer", slots=4)
    assert per_layer["misses"][4] == direct.misses
    assert [layer["layer"] for layer in per_layer["per_layer"]] == [1, 2, 5]
    assert [layer["misses"][4] for layer in per_layer["per_layer"]] == [layer.misses for layer in direct.by_layer]
    assert one_pool["misses"][13] == replay(read, policy="lru", cache_scope="global", slots=13).misses
    assert one_pool["per_layer"] is None
    assert f"{per_layer['misses'][4]}" in capsys.readouterr().out


def test_a_profile_brings_static_in(trace: Path, tmp_path: Path) -> None:
    output = tmp_path / "r.json"
    main([str(trace), "--slots", "4", "--profile", str(trace), "--output", str(output)])
    found = {row["policy"]: row["misses"] for row in json.loads(output.read_text())["results"]}
    assert list(found) == list(POLICIES)
    read = read_trace(trace)
    static = replay(read, policy="static", cache_scope="per_layer", slots=4, profile=read)
    assert found["static"] == static.misses


@pytest.mark.parametrize("extension", ["npz", "csv"])
def test_a_trace_goes_through_other_formats_and_back(trace: Path, tmp_path: Path, extension: str) -> None:
    there, back, output = tmp_path / "new" / f"t.{extension}", tmp_path / "back.safetensors", tmp_path / "r.json"
    main([str(trace), "--export", str(there)])
    main([str(there), "--num-experts", "10", "--expert-bytes", "64", "--export", str(back)])
    main([str(back), "--slots", "4", "--policy", "lru", "--output", str(output)])
    row = json.loads(output.read_text())["results"][0]
    assert row["misses"] == replay(read_trace(trace), policy="lru", cache_scope="per_layer", slots=4).misses
    assert row["bytes_read_per_token"] == pytest.approx(64 * row["misses"] / 50)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--slots", "1,4"], "the smallest that works is 2"),
        (["--slots", "four"], "--slots 'four' is no list of numbers; write for example 4,6,8,12"),
        (["--slots", ","], "--slots ',' is no list of numbers"),
        (["--slots", "4", "--policy", "lru,best"], "unknown policy 'best'"),
        (["--slots", "4", "--cache-scope", "both"], "unknown cache scope 'both'"),
        (["--slots", "4", "--policy", "static"], "'static' keeps the experts .* was given none"),
        (["--policy", "fifo"], "--slots names none; write for example --slots 4,6,8,12"),
        (["--cache-scope", "global"], "--slots names none"),
        (["--num-experts", "12"], "num_experts 10, not 12; leave --num-experts out"),
        (["--export", "t.json"], "extension '.json' names no format"),
    ],
)
def test_mistakes_are_named(trace: Path, arguments: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        main([str(trace), *arguments])


def test_a_profile_for_nothing_is_refused(trace: Path) -> None:
    with pytest.raises(UserError, match="--profile is for the policy static, and --policy is lru; add static to it"):
        main([str(trace), "--slots", "4", "--policy", "lru", "--profile", str(trace)])


def test_a_mistake_ends_in_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "replay", str(tmp_path / "none.npy"), "--slots", "4"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: routing trace ")
    assert done.stderr.count("\n") == 1


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "remoe replay trace.safetensors" in capsys.readouterr().out
