"""What `remoe run` says while it runs: one line for everything found, changes beside the base, a table at the end."""

from pathlib import Path

import pytest

from evaluation.results import Run
from launch.narration import Narration, say_the_end
from tests.evaluation.made_results import made_results


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line.split("  ", 1)[1] for line in capsys.readouterr().out.splitlines()]


def test_the_base_is_told_in_its_own_figures_and_arms_as_changes(capsys: pytest.CaptureFixture[str]) -> None:
    results = made_results()
    base, tuned = results.arms["base"].runs[0], results.arms["cache"].runs[0]
    narration = Narration()
    narration.found("base", base.model_copy(update={"quality": None}))
    narration.found("base", base)
    narration.found("cache", tuned.model_copy(update={"quality": None, "seed": 3}))
    narration.found("cache", tuned)
    routing, quality, routing_of_arm, quality_of_arm = lines(capsys)
    assert base.routing is not None
    assert routing.startswith(f"base: a token reuses {base.routing.reuse_rate_mean:.3f} of the experts")
    assert "LRU misses with 6 slots a layer" in routing
    assert quality.startswith("base: mean perplexity ")
    assert routing_of_arm.startswith("cache, seed 3: EOR +")
    assert "%" in quality_of_arm


def test_a_run_without_routing_is_told_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    empty = Run(
        seed=None, history=None, quality=None, difference=None, routing=None, replay=None, lru_curves=None, decode=None
    )
    Narration().found("base", empty)
    assert lines(capsys) == ["base: its routing was not measured"]


def test_every_cache_size_is_one_line_with_the_mean_over_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    arms = made_results().arms
    first = {name: [(run.decode or [])[0] for run in arm.runs] for name, arm in arms.items()}
    for row, read in zip(first["cache"], (1.0, 2.0, 3.0), strict=True):
        row.bytes_read_per_token = read * 2**20
    first["base"][0].bytes_read_per_token, first["base"][0].demands = 4 * 2**20, 0.5
    Narration().decoded([(name, row) for name, rows in first.items() for row in rows])
    (line,) = lines(capsys)
    assert line.startswith(
        "decoded with a cache of 0.5× what a token uses: the base reads 4.00\N{NO-BREAK SPACE}MiB a token;"
    )
    assert "; cache −50.0" in line


def test_the_end_is_a_table_of_every_arm_and_the_place_of_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    say_the_end(made_results(), Path("runs/x"))
    shown = capsys.readouterr().out
    assert all(arm in shown for arm in made_results().arms)
    assert "TPOT" not in shown
    assert shown.splitlines()[-1].startswith("The report is runs/x/report.html")
