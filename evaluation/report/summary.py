"""The report's arithmetic: means over seeds, changes against base, which arm is best. No text, no pictures.

What was not measured is None throughout and never counts as a number.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal, NamedTuple

from evaluation.results import BASE, MEAN, Decode, Difference, Quality, Replay, Results, Routing, Run, TaskDifference
from evaluation.turns import PairedRatio, paired_ratio

PERPLEXITY_LIMIT = 0.01  # the best arm may cost at most this much mean perplexity, relative to base
CONFIDENCE = 0.95
NORMAL_95 = statistics.NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
BUSY_SHARE = 0.1  # of the processors' time: if others take more of it, times say little
Number = float | None
Time = Literal["ttft_ms", "tpot_ms"]


@dataclass(frozen=True)
class SeedMean:
    """Mean over the `n` seeds that were measured; `sd` is their sample standard deviation, None for a single seed."""

    mean: float
    sd: Number
    n: int


@dataclass(frozen=True)
class Change:
    """Tuned minus base. `low` and `high` are the means of the seeds' own paired 95 % bounds.

    That is wide enough: seeds are scored on the same items, and the standard error of a mean of correlated differences
    is at most the mean of their standard errors.
    """

    value: SeedMean
    low: Number
    high: Number
    p: Number = None  # of no difference: twice the mean over seeds, which holds however they depend on each other

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


class FrontierPoint(NamedTuple):
    """What an arm reads per token with one expert cache, and what its mean perplexity costs against base."""

    bytes_per_token: SeedMean
    cost: Change


def seed_mean(values: Iterable[Number]) -> SeedMean | None:
    """Mean and sample standard deviation of what was measured; None if nothing was."""
    known = [value for value in values if value is not None]
    sd = statistics.stdev(known) if len(known) > 1 else None
    return SeedMean(statistics.fmean(known), sd, len(known)) if known else None


def place_means(values_by_run: Iterable[Sequence[Number]]) -> list[SeedMean | None]:
    """The means over runs place by place, for example layer by layer; a run may have fewer places than another."""
    return [seed_mean(values) for values in zip_longest(*values_by_run)]


def relative_change(value: Number, base: Number) -> Number:
    """(value - base) / base; None where either is unknown or base is 0."""
    return None if value is None or not base else (value - base) / base


def all_runs(results: Results) -> list[Run]:
    return [run for arm in results.arms.values() for run in arm.runs]


def tuned_arms(results: Results) -> list[str]:
    return [arm for arm in results.arms if arm != BASE]


def over_base(results: Results, arm: str, value_of: Callable[[Run], Number]) -> SeedMean | None:
    """Relative change of `value_of(run)` against the mean of base, over seeds; None for base itself."""
    base = seed_mean(map(value_of, results.arms[BASE].runs))
    if arm == BASE or base is None:
        return None
    return seed_mean(relative_change(value_of(run), base.mean) for run in results.arms[arm].runs)


def routings(results: Results, arm: str) -> list[Routing]:
    """What was measured of an arm's routing, one per seed."""
    return [run.routing for run in results.arms[arm].runs if run.routing]


def qualities(results: Results, arm: str) -> list[Quality]:
    """What was measured of an arm's quality, one per seed."""
    return [run.quality for run in results.arms[arm].runs if run.quality]


def decodes(results: Results, arm: str, budget_bytes: int) -> list[Decode]:
    """What an arm decoded with one expert cache, one row per seed."""
    return [row for run in results.arms[arm].runs if (row := decode_row(run, budget_bytes))]


def chance_reuse_rate(results: Results) -> SeedMean | None:
    """EOR of experts chosen at random."""
    return seed_mean(routing.chance_reuse_rate for routing in routings(results, BASE))


def reuse_rate(run: Run) -> Number:
    """EOR, mean over layers."""
    return run.routing.reuse_rate_mean if run.routing else None


def replay_row(run: Run, policy: str, slots: int) -> Replay | None:
    return next((row for row in run.replay or [] if (row.policy, row.slots) == (policy, slots)), None)


def miss_rate(run: Run, slots: int, policy: str = "lru", *, first_touches: bool = True) -> Number:
    """Misses per access, all of them or those that are no first touches."""
    row = replay_row(run, policy, slots)
    if row is None or not row.accesses:
        return None
    misses = row.misses if first_touches else row.misses_without_first_touches
    return None if misses is None else misses / row.accesses


def policy_regret(run: Run, slots: int, policy: str) -> Number:
    """Misses per miss of Belady's optimum."""
    row = replay_row(run, policy, slots)
    return None if row is None else row.policy_regret


def lru_miss_rate(run: Run, slots: int) -> Number:
    """Misses per access of LRU at any size, whether the tables show it or not."""
    curve = run.lru_curves.per_layer if run.lru_curves else None
    if curve is None or slots >= len(curve.misses) or not curve.accesses:
        return miss_rate(run, slots)
    return curve.misses[slots] / curve.accesses


def miss_change(results: Results, arm: str, slots: int) -> SeedMean | None:
    """LRU misses relative to base."""
    return over_base(results, arm, lambda run: miss_rate(run, slots))


def replay_sizes(results: Results) -> list[int]:
    """Every cache size per layer that any run was replayed at, ascending."""
    return sorted({row.slots for run in all_runs(results) for row in run.replay or []})


def lru_sizes(results: Results) -> list[int]:
    """Every size per layer that LRU's misses are known at and that holds a token's experts, ascending."""
    curves = [run.lru_curves.per_layer for run in all_runs(results) if run.lru_curves]
    largest = max((len(curve.misses) - 1 for curve in curves), default=0)
    return sorted({*range(results.model.top_k or 1, largest + 1), *replay_sizes(results)})


def replay_policies(results: Results) -> list[str]:
    """In order of first appearance."""
    return list(dict.fromkeys(row.policy for run in all_runs(results) for row in run.replay or []))


def headline_sizes(results: Results) -> list[int]:
    """The measured sizes nearest to 1.5 K and 3 K slots: C = 6 and 12 for the shipped model, which chooses 4."""
    sizes, top_k = replay_sizes(results), results.model.top_k
    if not sizes or not top_k:
        return []
    return sorted({min(sizes, key=lambda size: (abs(size - factor * top_k), size)) for factor in (1.5, 3)})


def decode_row(run: Run, budget_bytes: int) -> Decode | None:
    return next((row for row in run.decode or [] if row.expert_cache_bytes == budget_bytes), None)


def bytes_per_token(run: Run, budget_bytes: int) -> Number:
    row = decode_row(run, budget_bytes)
    return None if row is None else row.bytes_read_per_token


def decode_rows(results: Results) -> list[Decode]:
    return [row for run in all_runs(results) for row in run.decode or []]


def decode_budgets(results: Results) -> list[int]:
    """Every expert cache, in bytes, that any run decoded with, ascending."""
    return sorted({row.expert_cache_bytes for row in decode_rows(results)})


def headline_budget(results: Results) -> int | None:
    """The smallest budget of at least one token's demand that every run that decoded at all decoded with.

    Below one demand an LRU pool of all layers hits nothing, whatever the routing; such a budget only counts where there
    is no other.
    """
    decoding = [run for run in all_runs(results) if run.decode]
    common = [size for size in decode_budgets(results) if all(decode_row(run, size) for run in decoding)]
    demand = results.model.token_demand_bytes or 0
    return next((size for size in common if size >= demand), min(common, default=None))


def turn_times(results: Results, arm: str, budget_bytes: int, time: Time) -> list[Number]:
    """A time of every turn, mean over seeds; none where only the mean of all turns was kept."""
    means = place_means(getattr(row, time) or [] for row in decodes(results, arm, budget_bytes))
    return [None if found is None else found.mean for found in means]


def time_ratio(results: Results, arm: str, budget_bytes: int, time: Time) -> PairedRatio | None:
    """A time against base's of the same prompt and repeat; None for base itself, and where turns are not kept."""
    own, base = (turn_times(results, name, budget_bytes, time) for name in (arm, BASE))
    return None if arm == BASE or len(own) != len(base) else paired_ratio(own, to=base)


def is_busy(results: Results) -> bool:
    """Whether others took so much of the processors' time while models were decoded that times say little."""
    load = results.machine_load
    return load is not None and load.stolen_share + load.others_share > BUSY_SHARE


def mean_perplexity(results: Results, arm: str) -> SeedMean | None:
    return seed_mean(quality.mean_perplexity for quality in qualities(results, arm))


def task_change(results: Results, arm: str, task: str, *, shares: bool = True) -> Change | None:
    """The difference of a task's metric from base, if it is a share; with `shares=False`, if it is none."""
    entries = [(found.tasks if shares else found.other).get(task) for found in _differences(results, arm)]
    known = [entry for entry in entries if entry]
    p_values = [_p_value(entry) for entry in known]
    return _change([(entry.difference, entry.low, entry.high) for entry in known], p_values)


def _p_value(found: TaskDifference) -> Number:
    """As measured, or that of a normal distribution with this interval."""
    if found.p is not None or None in (found.difference, found.low, found.high):
        return found.p
    half = (found.high - found.low) / 2  # type: ignore[operator]
    return 2 * statistics.NormalDist().cdf(-abs(found.difference) / half * NORMAL_95) if half else None  # type: ignore[arg-type]


def task_changes(results: Results, arm: str) -> dict[str, Change]:
    """The differences of all tasks that are shares and were compared."""
    return {task: found for task in task_names(results) if (found := task_change(results, arm, task))}


def certain(changes: Mapping[str, Change]) -> list[str]:
    """Those that differ from zero although so many were looked at: by Holm's correction (1979) of their p-values, at 5 %."""
    known = sorted((found.p, name) for name, found in changes.items() if found.p is not None)
    holds = [p * (len(known) - place) < 1 - CONFIDENCE for place, (p, _) in enumerate(known)]
    return [name for place, (_, name) in enumerate(known) if all(holds[: place + 1])]


def perplexity_change(results: Results, arm: str, domain: str = MEAN) -> Change | None:
    """The relative change of a domain's perplexity, or of the mean over domains."""
    entries = [found.perplexity.get(domain) for found in _differences(results, arm)]
    return _change([(entry.relative, entry.low, entry.high) for entry in entries if entry])


def task_names(results: Results, *, within_groups: bool = False) -> list[str]:
    """What was asked of any run, in order of first appearance: tasks, and groups as a whole unless `within_groups`."""
    inner = {
        name for arm in results.arms for q in qualities(results, arm) for name, of in q.tasks.items() if of.of_group
    }
    return [name for name in _names(results, lambda part: part.tasks) if within_groups or name not in inner]


def domain_names(results: Results) -> list[str]:
    """All domains of any run, in order of first appearance."""
    return [name for name in _names(results, lambda part: part.perplexity) if name != MEAN]


def worst_task(results: Results, arm: str) -> tuple[str, Change] | None:
    """The task that falls most (mean over seeds)."""
    return min(task_changes(results, arm).items(), key=lambda pair: pair[1].value.mean, default=None)


def _differences(results: Results, arm: str) -> list[Difference]:
    return [run.difference for run in results.arms[arm].runs if run.difference]


def _change(entries: Sequence[tuple[Number, Number, Number]], p_values: Sequence[Number] = ()) -> Change | None:
    middle, low, high = (seed_mean(entry[part] for entry in entries) for part in range(3))
    if middle is None:
        return None
    p = seed_mean(p_values)
    of_seeds = None if p is None else p.mean if p.n == 1 else min(1.0, 2 * p.mean)
    return Change(middle, None if low is None else low.mean, None if high is None else high.mean, of_seeds)


def _names(results: Results, part_of: Callable[[Quality | Difference], Iterable[str]]) -> list[str]:
    parts = [part for run in all_runs(results) for part in (run.quality, run.difference) if part]
    return list(dict.fromkeys(name for part in parts for name in part_of(part)))


def frontier(results: Results, budget_bytes: int) -> dict[str, FrontierPoint]:
    """Every arm of which both bytes and quality are known; base costs nothing."""
    points = {}
    for arm in results.arms:
        read = seed_mean(row.bytes_read_per_token for row in decodes(results, arm, budget_bytes))
        cost = Change(SeedMean(0.0, None, 1), None, None) if arm == BASE else perplexity_change(results, arm)
        if read is not None and cost is not None:
            points[arm] = FrontierPoint(read, cost)
    return points


def frontier_budgets(results: Results) -> list[int]:
    """At most three budgets from one token's demand up at which base and another arm can be compared."""
    demand = results.model.token_demand_bytes or 0
    return [size for size in decode_budgets(results) if size >= demand and {BASE} < set(frontier(results, size))][:3]


def miss_score(results: Results, arm: str) -> Number:
    """What the best arm is chosen by: LRU misses relative to base, mean over the headline sizes."""
    changes = [miss_change(results, arm, size) for size in headline_sizes(results)]
    known = [change.mean for change in changes if change]
    return statistics.fmean(known) if known and len(known) == len(changes) else None


def best_arm(results: Results) -> str | None:
    """The arm with the fewest LRU misses of those that cost at most `PERPLEXITY_LIMIT`."""
    within = [arm for arm, cost in perplexity_costs(results).items() if cost.mean <= PERPLEXITY_LIMIT]
    scores = {arm: score for arm in within if (score := miss_score(results, arm)) is not None}
    return min(scores, key=lambda arm: scores[arm], default=None)


def perplexity_costs(results: Results) -> dict[str, SeedMean]:
    """The change of mean perplexity of every tuned arm where it was measured."""
    return {arm: found.value for arm in tuned_arms(results) if (found := perplexity_change(results, arm))}
