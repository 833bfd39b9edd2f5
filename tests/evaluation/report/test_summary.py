"""The arithmetic of the report, on hand-made results with hand-computed answers."""

import pytest

from evaluation.report.summary import (
    Change,
    SeedMean,
    best_arm,
    certain,
    decode_budgets,
    headline_budget,
    headline_sizes,
    is_busy,
    mean_perplexity,
    miss_change,
    miss_rate,
    perplexity_change,
    perplexity_costs,
    place_means,
    relative_change,
    seed_mean,
    task_change,
    time_ratio,
    turn_times,
    worst_task,
)
from evaluation.report.wording import headline
from evaluation.results import MachineLoad, PerplexityDifference, Results, TaskDifference
from evaluation.turns import PairedRatio
from tests.evaluation.made_results import made_results


def set_cost(results: Results, arm: str, *costs: float) -> None:
    for run, cost in zip(results.arms[arm].runs, costs, strict=True):
        run.difference.perplexity["mean"] = PerplexityDifference(relative=cost, low=cost - 0.002, high=cost + 0.002)


def set_misses(results: Results, arm: str, slots: int, *misses: int) -> None:
    for run, count in zip(results.arms[arm].runs, misses, strict=True):
        next(row for row in run.replay if (row.policy, row.slots) == ("lru", slots)).misses = count


def test_over_seeds_there_is_the_mean_and_the_sample_standard_deviation() -> None:
    assert seed_mean([1.0, 2.0, 6.0]) == SeedMean(3.0, pytest.approx(7**0.5), 3)


def test_the_mean_over_seeds_leaves_out_what_was_not_measured_instead_of_counting_it_as_zero() -> None:
    assert seed_mean([None, 4.0, None]) == SeedMean(4.0, None, 1)
    assert seed_mean([None, None]) is None


def test_relative_change_needs_a_base_other_than_zero() -> None:
    assert relative_change(3.0, 4.0) == -0.25
    assert relative_change(3.0, 0.0) is None
    assert relative_change(None, 4.0) is None


def test_means_are_taken_place_by_place_over_seeds() -> None:
    assert place_means([[1.0, None], [3.0, 5.0]]) == [SeedMean(2.0, pytest.approx(2**0.5), 2), SeedMean(5.0, None, 1)]


def test_miss_rate_is_misses_per_access_and_none_where_not_replayed() -> None:
    results = made_results()
    set_misses(results, "base", 6, 480000)
    run = results.arms["base"].runs[0]
    assert miss_rate(run, 6) == 0.5
    assert miss_rate(run, 7) is None
    run.replay = None
    assert miss_rate(run, 6) is None


def test_miss_change_compares_every_seed_with_base() -> None:
    results = made_results()
    set_misses(results, "base", 6, 500000)
    set_misses(results, "cache", 6, 400000, 350000, 300000)
    assert miss_change(results, "cache", 6) == SeedMean(pytest.approx(-0.3), pytest.approx(0.1), 3)
    assert miss_change(results, "base", 6) is None


def test_headline_sizes_are_6_and_12_for_four_chosen_experts_and_grow_with_their_number() -> None:
    results = made_results()
    assert headline_sizes(results) == [6, 12]
    results.model.top_k = 8
    assert headline_sizes(results) == [12, 24]


def test_headline_budget_is_the_smallest_common_one_that_holds_a_tokens_demand() -> None:
    results = made_results()
    sizes = decode_budgets(results)
    assert headline_budget(results) == sizes[1] == results.model.token_demand_bytes
    remoe = results.arms["remoe"].runs[0]
    remoe.decode = [row for row in remoe.decode if row.expert_cache_bytes != sizes[1]]
    assert headline_budget(results) == sizes[2]
    remoe.decode = [row for row in remoe.decode if row.demands < 1]
    assert headline_budget(results) == sizes[0]


def test_the_interval_over_seeds_is_the_mean_of_theirs() -> None:
    results = made_results()
    set_cost(results, "cache", -0.001, 0.000, 0.004)
    found = perplexity_change(results, "cache")
    assert found is not None
    assert found.value.mean == pytest.approx(0.001)
    assert (found.low, found.high) == (pytest.approx(-0.001), pytest.approx(0.003))
    assert not found.excludes_zero
    set_cost(results, "cache", 0.001, 0.002, 0.006)
    found = perplexity_change(results, "cache")
    assert found is not None
    assert found.excludes_zero


def test_a_change_is_certain_by_holms_correction() -> None:
    def change(p: float | None) -> Change:
        return Change(SeedMean(-0.1, None, 1), -0.2, -0.01, p)

    found = {"a": change(0.011), "b": change(0.04), "c": change(0.016), "d": change(0.3), "e": change(None)}
    assert certain(found) == ["a", "c"]  # 4 x 0.011 and 3 x 0.016 are below 0.05, 2 x 0.04 is not
    assert certain({"a": change(0.02), "b": change(0.001), "c": change(0.03)}) == ["b", "a", "c"]
    assert certain({"a": change(0.03), "b": change(0.03)}) == []


def test_without_a_p_value_the_interval_gives_one() -> None:
    results = made_results()
    task = results.arms["remoe"].runs[0].difference.tasks["letters"]
    task.difference, task.low, task.high, task.p = -0.0196, -0.0392, 0.0, None
    found = task_change(results, "remoe", "letters")
    assert found is not None
    assert found.p == pytest.approx(0.05, abs=1e-4)


def test_worst_task_is_the_one_that_falls_most() -> None:
    results = made_results()
    results.arms["remoe"].runs[0].difference.tasks["letters"] = TaskDifference(difference=-0.4, low=-0.5, high=-0.3)
    found = worst_task(results, "remoe")
    assert found is not None
    assert found[0] == "letters"
    assert found[1].value.mean == -0.4
    assert worst_task(results, "base") is None


def test_best_arm_has_the_fewest_misses_among_those_within_the_perplexity_limit() -> None:
    results = made_results()  # remoe is beyond the limit, ce_only within it with the misses of base
    assert best_arm(results) == "cache"
    set_cost(results, "cache", 0.0101, 0.0101, 0.0101)
    assert best_arm(results) == "ce_only"
    set_cost(results, "remoe", 0.01)
    assert best_arm(results) == "remoe"


def test_no_arm_is_best_when_none_is_within_the_limit() -> None:
    results = made_results()
    set_cost(results, "ce_only", 0.03)
    set_cost(results, "cache", 0.02, 0.02, 0.02)
    assert best_arm(results) is None
    costs = {arm: cost.mean for arm, cost in perplexity_costs(results).items()}
    assert costs == pytest.approx({"ce_only": 0.03, "remoe": 0.0162, "cache": 0.02})
    assert "the cheapest, remoe, is at" in headline(results)


def test_an_arm_without_measured_perplexity_is_never_best() -> None:
    results = made_results()
    for run in results.arms["cache"].runs:
        run.difference = None
    assert best_arm(results) == "ce_only"


def test_a_figure_is_none_below_a_part_that_was_not_measured() -> None:
    results = made_results()
    results.arms["base"].runs[0].quality = None
    assert mean_perplexity(results, "base") is None


def set_times(results: Results, arm: str, *times_by_seed: list[float | None] | None) -> None:
    for run, times in zip(results.arms[arm].runs, times_by_seed, strict=True):
        run.decode[0].tpot_ms = times


def test_times_of_a_turn_are_means_over_seeds_and_compared_with_base_turn_by_turn() -> None:
    results = made_results()
    budget = decode_budgets(results)[0]
    set_times(results, "base", [10.0, 20.0, 40.0, 80.0, 160.0, 320.0, None])
    thirds = [3.0, 6.0, 12.0, 24.0, 48.0, 96.0, 7.0]
    set_times(results, "cache", thirds, [2 * time for time in thirds], [3 * time for time in thirds])
    assert turn_times(results, "cache", budget, "tpot_ms") == pytest.approx([2 * time for time in thirds])
    found = time_ratio(results, "cache", budget, "tpot_ms")
    assert found == PairedRatio(pytest.approx(0.6), pytest.approx(0.6), pytest.approx(0.6), 6)
    assert found.shows
    assert time_ratio(results, "base", budget, "tpot_ms") is None
    set_times(results, "base", None)
    assert turn_times(results, "base", budget, "tpot_ms") == []
    assert time_ratio(results, "cache", budget, "tpot_ms") is None


def test_a_machine_is_busy_when_others_and_the_hypervisor_together_have_more_than_a_tenth() -> None:
    results = made_results()
    assert not is_busy(results), "nobody looked"
    load = {"load_average_before": 2.0, "load_average_after": 2.0, "stolen_share": 0.04}
    results.machine_load = MachineLoad(**load, others_share=0.05)
    assert not is_busy(results)
    results.machine_load = MachineLoad(**load, others_share=0.07)
    assert is_busy(results)
