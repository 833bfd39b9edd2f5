"""One trial of `remoe bench memory`, in a real process and a real memory group."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from configs.load import UserError
from evaluation.benchmark import memory as bench_memory
from evaluation.benchmark.memory import MemoryBenchmark, Outcome, benchmark, one_trial
from evaluation.benchmark.memory_group import Hierarchy, MemoryGroup, find_hierarchy
from evaluation.benchmark.sides.memory_trial import Trial

Checkpoint = Callable[..., Path]
MEBIBYTE = 2**20


@pytest.fixture
def hierarchy() -> Hierarchy:
    found = find_hierarchy()
    if found is None:
        pytest.skip("no memory controller here in which groups can be made")
    return found


def trial(folder: Path, **changed: Any) -> Trial:
    usual = {
        "model_dir": str(folder), "batch": 2, "context_tokens": 20, "new_tokens": 4, "memory_budget": 200 * MEBIBYTE,
        "seed": 0, "threads": 1,
    }  # fmt: skip
    return Trial(**{**usual, **changed})


@pytest.mark.slow
def test_a_request_within_its_budget_is_served_and_its_peak_is_seen(
    checkpoint: Checkpoint, hierarchy: Hierarchy
) -> None:
    found = one_trial(trial(checkpoint()), hierarchy)
    assert found.outcome == "served", found
    assert found.before_bytes > 50 * MEBIBYTE
    assert 0 < found.share < 0.5


@pytest.mark.slow
def test_a_budget_that_is_too_small_is_refused_before_anything_is_computed(
    checkpoint: Checkpoint, hierarchy: Hierarchy
) -> None:
    found = one_trial(trial(checkpoint(), memory_budget=MEBIBYTE), hierarchy)
    assert found.outcome == "refused"
    assert "too small" in str(found.why)


@pytest.mark.slow
def test_a_process_that_takes_more_than_its_group_may_hold_is_told_apart(
    checkpoint: Checkpoint, hierarchy: Hierarchy, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = MemoryGroup.limit

    def tight(group: MemoryGroup, _: int) -> None:
        (number,) = (group.path / "cgroup.procs").read_text().split()
        info = psutil.Process(int(number)).memory_info()
        limit(group, info.rss - info.shared + 2 * MEBIBYTE)

    monkeypatch.setattr(MemoryGroup, "limit", tight)
    assert one_trial(trial(checkpoint(), batch=6, context_tokens=300), hierarchy).outcome == "killed"


def test_a_process_that_does_not_start_is_a_failed_trial(
    checkpoint: Checkpoint, hierarchy: Hierarchy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_memory, "MODULE", "evaluation.no_such_module")
    found = one_trial(trial(checkpoint()), hierarchy)
    assert found.outcome == "failed"
    assert "no_such_module" in str(found.why)


def test_a_broken_budget_ends_the_command_with_an_error_and_the_result_is_written(
    checkpoint: Checkpoint, hierarchy: Hierarchy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = iter([("refused", 0), ("served", 102 * MEBIBYTE), ("served", 105 * MEBIBYTE)])

    def pretended(wanted: Trial, _: Hierarchy) -> Outcome:
        name, peak = next(outcomes)
        return Outcome(100 * MEBIBYTE, wanted.context_tokens, wanted.batch, name, 0, peak)

    monkeypatch.setattr(bench_memory, "one_trial", pretended)
    output = tmp_path / "memory.json"
    with pytest.raises(UserError, match="1 of 3 budgets were not kept"):
        benchmark(MemoryBenchmark(model=str(checkpoint()), trials=2, output=str(output)))
    assert '"most_share": 1.05' in output.read_text()


def test_a_model_that_fits_no_budget_ends_the_search(
    checkpoint: Checkpoint, hierarchy: Hierarchy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_memory, "one_trial", lambda *_: Outcome(1, 1, 1, "refused", 0, 0, why="too small"))
    with pytest.raises(UserError, match="10 budgets in a row were refused"):
        benchmark(MemoryBenchmark(model=str(checkpoint()), trials=2))


def test_senseless_numbers_are_refused() -> None:
    with pytest.raises(UserError, match="--trials is 0; write at least 1"):
        MemoryBenchmark(model="any", trials=0)
    with pytest.raises(UserError, match="--most-tokens is 5; write at least 96"):
        MemoryBenchmark(model="any", most_tokens=5)
