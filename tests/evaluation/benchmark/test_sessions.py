"""The benchmark of sessions: every division and the controller take turns, and the plan is compared with the best."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from configs.load import UserError
from evaluation.benchmark.sessions import FROM_EVEN, FROM_PLAN, SessionsBenchmark, benchmark
from evaluation.engine.sessions.workload import SHARES


def options(**changed: Any) -> SessionsBenchmark:
    return SessionsBenchmark(model="data/embedded/model", memory_budget="64MiB", **changed)


def test_the_benchmark_runs_every_division_and_the_controller(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "sessions.json"
    small = {
        "conversations": 2,
        "turns": 2,
        "prefix_tokens": 20,
        "question_tokens": 8,
        "max_new_tokens": 2,
        "repeats": 2,
    }
    benchmark(options(**small, block_tokens=16, divisions="0,1", output=str(output)))
    found = json.loads(output.read_text())["workloads"]
    assert list(found) == ["mixed", "changing"]
    for workload in found.values():
        assert workload["answers_equal"]
        assert {"0.0", "0.5", "1.0", str(workload["plan_chooses"])} <= set(workload["median_seconds"]) < {
            *map(str, SHARES), FROM_PLAN, FROM_EVEN
        }  # fmt: skip
        from_plan, from_even = (workload["controller_capacities"][name][0][0] for name in (FROM_PLAN, FROM_EVEN))
        assert from_plan == int(workload["plan_chooses"] * workload["shared_bytes"])
        assert from_even == int(0.5 * workload["shared_bytes"])
        assert 0 < workload["deciding_seconds"] < workload["median_seconds"][FROM_PLAN]
    printed, progress = capsys.readouterr()
    assert all(name in printed for name in (FROM_PLAN, FROM_EVEN))
    order = re.findall(r"^(.+): [\d.]+ s, ", progress, re.MULTILINE)[: 2 * len(found["mixed"]["seconds"])]
    assert order == order[::-1], "the second repeat goes backwards"


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match=r"--divisions '0\.3' is not known; write some of 0\.0,0\.125"):
        options(divisions="0.5,0.3")
    with pytest.raises(UserError, match="--workloads 'mixd' is not known; write some of mixed,changing"):
        options(workloads="changing,mixd")
