"""`remoe replay`: the JSON that others read, and one message for each mistake."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from configs.load import UserError
from evaluation.engine.route_trace import RouteTrace
from evaluation.replay import main


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    ids = np.stack([np.stack([generator.permutation(10)[:2] for _ in range(3)]) for _ in range(50)])
    tokens = np.arange(50)
    path = tmp_path / "t.safetensors"
    RouteTrace(
        ids,
        phase=tokens * 0 + 1,
        request_id=tokens // 25,
        call=tokens,
        num_experts=10,
        layer_ids=(1, 2, 5),
        expert_bytes=64,
    ).save(path)
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


def test_regret_is_null_where_the_optimum_was_not_asked_for(trace: Path, tmp_path: Path) -> None:
    output = tmp_path / "r.json"
    main([str(trace), "--policy", "lru", "--cache-scope", "global", "--slots", "7", "--output", str(output)])
    assert json.loads(output.read_text())["results"][0]["policy_regret"] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--slots", "1,4"], "the smallest that works is 2"),
        (["--slots", "four"], "--slots 'four' is not a list of whole numbers; write for example 4,6,8,12"),
        (["--slots", ","], "--slots ',' names no size"),
        (["--slots", "4", "--policy", "lru,best"], "unknown policy 'best'"),
        (["--slots", "4", "--cache-scope", "both"], "unknown cache scope 'both'"),
    ],
)
def test_mistakes_are_named(trace: Path, arguments: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        main([str(trace), *arguments])


def test_a_mistake_ends_in_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "evaluation.replay", str(tmp_path / "none"), "--slots", "4"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: routing trace ")
    assert done.stderr.count("\n") == 1


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "remoe replay trace.safetensors" in capsys.readouterr().out
