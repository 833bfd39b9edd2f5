"""The report's memory budgets: what is shown is what was measured, worked out by hand here."""

import pytest

from evaluation.report.documents import markdown, page
from evaluation.report.plan_tables import expected_tpot_ms, misses_per_token, plan_tables
from evaluation.results import Results, TooSmall
from tests.evaluation.made_results import made_results


@pytest.fixture
def results() -> Results:
    return made_results()


def test_a_budgets_parts_and_what_every_arm_would_cost(results: Results) -> None:
    divided, costs = plan_tables(results)
    assert [row[0] for row in divided.rows] == ["46.0\N{NO-BREAK SPACE}MiB", "64.0\N{NO-BREAK SPACE}MiB"]
    assert divided.rows[0][1] == "8.00\N{NO-BREAK SPACE}MiB"
    assert [row[-1] for row in divided.rows] == ["20 of 128", "128 of 128"]
    assert [row[1] for row in costs.rows] == ["base", "ce_only", "remoe", "cache"] * 2
    base, *_, cache = costs.rows[:4]
    assert base[3] == "–"
    assert cache[3].startswith("−")


def test_a_budget_in_parts_of_the_smallest_is_named_as_it_was_asked_for(results: Results) -> None:
    results.plans[0].memory_budget, results.plans[1].memory_budget = "smallest + 10%", "64MiB"
    divided, costs = plan_tables(results)
    names = ["46.0\N{NO-BREAK SPACE}MiB\nsmallest + 10%", "64.0\N{NO-BREAK SPACE}MiB"]
    assert [row[0] for row in divided.rows] == names
    assert [row[0] for row in costs.rows] == [name for name in names for _ in range(4)]


def test_misses_are_those_of_one_pool_of_the_budgets_size_and_time_is_computing_plus_reading(
    results: Results,
) -> None:
    run, plan = results.arms["base"].runs[0], results.plans[0]
    run.lru_curves.shared.misses[20] = 120_000
    run.routing.n_tokens = 60_000
    assert misses_per_token(run, plan) == 2
    assert expected_tpot_ms(run, plan, 5_000_000) == pytest.approx(4.0 + 1e3 * 2 * 5e6 / 2e9)
    plan.division.slots = 10_000  # more than there are experts
    assert misses_per_token(run, plan) == run.lru_curves.shared.misses[-1] / 60_000


def test_what_was_not_measured_is_left_out(results: Results) -> None:
    results.arms["remoe"].runs[0].lru_curves = None
    results.plans[1].measured.compute_ms = None
    costs = plan_tables(results)[1]
    assert "remoe" not in [row[1] for row in costs.rows]
    assert [row[-1] == "–" for row in costs.rows] == [False] * 3 + [True] * 3
    results.plans = []
    assert plan_tables(results) == []
    assert "No budget was divided in this run." in markdown(results)
    assert "No budget was divided in this run." in page(results)


def test_a_budget_that_is_too_small_is_a_row_that_says_which_would_work(results: Results) -> None:
    small = TooSmall(memory_budget="43MiB", too_small="the smallest that works is 43.4MiB")
    results.budgets_too_small = [small]
    divided, costs = plan_tables(results)
    assert divided.rows[0] == ["43MiB\ntoo small: the smallest that works is 43.4MiB", *["–"] * 6]
    assert len(divided.rows) == 3
    assert len(costs.rows) == 8
    results.plans = []
    assert [table.title for table in plan_tables(results)] == ["Budgets divided"]
    assert "the smallest that works is 43.4MiB" in page(results)
    assert "too small: the smallest that works is 43.4MiB" in markdown(results)
