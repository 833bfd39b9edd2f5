"""The report's arithmetic: mean and spread over seeds, changes against base, which arm is best. No text, no pictures.

What was not measured is None throughout and never counts as a number.
"""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from evaluation.results import BASE, Results, Run

PERPLEXITY_LIMIT = 0.01  # the best arm may cost at most this much mean perplexity, relative to base
SCOPE = "per_layer"  # the cache scope of headline and figures, as in ReMoE (arXiv 2605.27081)
MEAN = "mean"  # key of the mean over domains among the perplexity differences


@dataclass(frozen=True)
class Spread:
    """Mean over the `n` seeds that were measured; `sd` is their sample standard deviation, None for a single seed."""

    mean: float
    sd: float | None
    n: int


@dataclass(frozen=True)
class Change:
    """Tuned minus base. `low` and `high` are the means of the seeds' own paired 95 % bounds.

    That is wide enough: seeds are scored on the same items, and the standard error of a mean of correlated differences
    is at most the mean of their standard errors.
    """

    spread: Spread
    low: float | None
    high: float | None

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Verdict:
    """`best` has the fewest LRU misses of the arms within the perplexity limit; `closest` costs least perplexity."""

    best: str | None
    closest: str | None


def spread(values: Iterable[float | None]) -> Spread | None:
    """Mean and sample standard deviation of what was measured; None if nothing was."""
    measured = [value for value in values if value is not None]
    if not measured:
        return None
    return Spread(statistics.fmean(measured), statistics.stdev(measured) if len(measured) > 1 else None, len(measured))


def relative(value: float | None, base: float | None) -> float | None:
    """(value - base) / base; None where either is unknown or base is 0."""
    return None if value is None or not base else (value - base) / base


def pick(node: Any, *path: str) -> Any:
    """The value at `path`, None where a step of it was not measured."""
    for key in path:
        node = None if node is None else node.get(key)
    return node


def runs_of(results: Results, arm: str) -> Sequence[Run]:
    runs: Sequence[Run] = results["arms"][arm]["runs"]
    return runs


def tuned_arms(results: Results) -> list[str]:
    return [arm for arm in results["arms"] if arm != BASE]


def measure(results: Results, arm: str, *path: str) -> Spread | None:
    """A number of every run, over seeds: `measure(results, "cache", "routing", "reuse_rate_mean")`."""
    return spread(pick(run, *path) for run in runs_of(results, arm))


def over_base(results: Results, arm: str, value_of: Callable[[Run], float | None]) -> Spread | None:
    """Relative change of `value_of(run)` against the mean of base, over seeds; None for base itself."""
    base = spread(value_of(run) for run in runs_of(results, BASE))
    if arm == BASE or base is None:
        return None
    return spread(relative(value_of(run), base.mean) for run in runs_of(results, arm))


def layers_of(values_by_run: Sequence[Sequence[float | None]]) -> list[Spread | None]:
    """Over seeds, per layer."""
    n_layers = max(map(len, values_by_run), default=0)
    return [spread(values[layer] for values in values_by_run if layer < len(values)) for layer in range(n_layers)]


def reuse_rate(run: Run) -> float | None:
    """EOR, mean over layers."""
    rate: float | None = pick(run, "routing", "reuse_rate_mean")
    return rate


def replay_row(run: Run, policy: str, slots: int) -> dict[str, Any] | None:
    for row in run["replay"] or []:
        if row["policy"] == policy and row["slots"] == slots and row["cache_scope"] == SCOPE:
            return dict(row)
    return None


def miss_rate(run: Run, slots: int, *, policy: str = "lru", key: str = "misses") -> float | None:
    """Misses per access; `key` may be `misses_without_first_touches`."""
    row = replay_row(run, policy, slots)
    if row is None or row[key] is None or not row["accesses"]:
        return None
    return float(row[key] / row["accesses"])


def lru_miss_rate(run: Run, slots: int) -> float | None:
    """Misses per access of LRU at any size, chosen for the tables or not."""
    curve = pick(run, "lru_curves", "per_layer")
    if curve is None or slots >= len(curve["misses"]) or not curve["accesses"]:
        return miss_rate(run, slots)
    return float(curve["misses"][slots] / curve["accesses"])


def miss_change(results: Results, arm: str, slots: int) -> Spread | None:
    """LRU misses relative to base."""
    return over_base(results, arm, lambda run: miss_rate(run, slots))


def replay_sizes(results: Results) -> list[int]:
    """Every cache size per layer that any run was replayed at, ascending."""
    return sorted({int(row["slots"]) for row in _rows(results, "replay") if row["cache_scope"] == SCOPE})


def lru_sizes(results: Results) -> list[int]:
    """Every size per layer that LRU's misses are known at and that holds a token's experts, ascending."""
    runs = [run for arm in results["arms"] for run in runs_of(results, arm)]
    curves = [run["lru_curves"]["per_layer"] for run in runs if run["lru_curves"]]
    largest = max((len(curve["misses"]) - 1 for curve in curves), default=0)
    smallest = results["model"]["top_k"] or 1
    return sorted({*range(int(smallest), largest + 1), *replay_sizes(results)})


def replay_policies(results: Results) -> list[str]:
    """In order of first appearance."""
    return list(dict.fromkeys(row["policy"] for row in _rows(results, "replay") if row["cache_scope"] == SCOPE))


def headline_sizes(results: Results) -> list[int]:
    """The measured sizes nearest to 1.5 K and 3 K slots: C = 6 and 12 for the shipped model, which chooses 4."""
    sizes, top_k = replay_sizes(results), results["model"]["top_k"]
    if not sizes or not top_k:
        return []
    return sorted({min(sizes, key=lambda size: (abs(size - factor * top_k), size)) for factor in (1.5, 3)})


def decode_row(run: Run, budget_bytes: int) -> dict[str, Any] | None:
    for row in run["decode"] or []:
        if row["expert_cache_bytes"] == budget_bytes:
            return dict(row)
    return None


def decode_value(run: Run, budget_bytes: int, *path: str) -> float | None:
    value: float | None = pick(decode_row(run, budget_bytes), *path)
    return value


def budgets(results: Results) -> list[int]:
    """Every expert cache, in bytes, that any run decoded with, ascending."""
    return sorted({int(row["expert_cache_bytes"]) for row in _rows(results, "decode")})


def headline_budget(results: Results) -> int | None:
    """The smallest budget of at least one token's demand that every run that decoded at all decoded with.

    Below one demand an LRU pool of all layers hits nothing, whatever the routing; such a budget only counts where there
    is no other.
    """
    decoded = [run for arm in results["arms"] for run in runs_of(results, arm) if run["decode"]]
    common = [size for size in budgets(results) if all(decode_row(run, size) for run in decoded)]
    demand = results["model"]["token_demand_bytes"] or 0
    return next((size for size in common if size >= demand), min(common, default=None))


def change(results: Results, arm: str, kind: str, name: str) -> Change | None:
    """The difference of one task (`kind` "tasks") or one domain's perplexity ("perplexity", relative) from base."""
    entries = [pick(run, "difference", kind, name) for run in runs_of(results, arm)]
    middle = spread(pick(entry, "difference" if kind == "tasks" else "relative") for entry in entries)
    if middle is None:
        return None
    lows = [entry["low"] for entry in entries if pick(entry, "low") is not None]
    highs = [entry["high"] for entry in entries if pick(entry, "high") is not None]
    return Change(middle, statistics.fmean(lows) if lows else None, statistics.fmean(highs) if highs else None)


@dataclass(frozen=True)
class FrontierPoint:
    """What an arm reads per token with one expert cache, and what its mean perplexity costs against base."""

    bytes_per_token: Spread
    cost: Change


def frontier(results: Results, budget_bytes: int) -> dict[str, FrontierPoint]:
    """Every arm of which both are known; base costs nothing."""
    points = {}
    for arm in results["arms"]:
        read = spread(decode_value(run, budget_bytes, "bytes_read_per_token") for run in runs_of(results, arm))
        cost = Change(Spread(0.0, None, 1), None, None) if arm == BASE else change(results, arm, "perplexity", MEAN)
        if read is not None and cost is not None:
            points[arm] = FrontierPoint(read, cost)
    return points


def frontier_budgets(results: Results) -> list[int]:
    """At most three budgets from one token's demand up at which base and another arm can be compared."""
    demand = results["model"]["token_demand_bytes"] or 0
    return [size for size in budgets(results) if size >= demand and {BASE} < set(frontier(results, size))][:3]


def worst_task(results: Results, arm: str) -> tuple[str, Change] | None:
    """The task that falls most (mean over seeds)."""
    found = [(task, change(results, arm, "tasks", task)) for task in names(results, "tasks")]
    measured = [(task, difference) for task, difference in found if difference is not None]
    return min(measured, key=lambda pair: pair[1].spread.mean, default=None)


def names(results: Results, kind: str) -> list[str]:
    """All tasks ("tasks") or domains ("perplexity") of any run, in order of first appearance."""
    found: dict[str, None] = {}
    for arm in results["arms"]:
        for run in runs_of(results, arm):
            for part in ("quality", "difference"):
                found.update(dict.fromkeys(pick(run, part, kind) or {}))
    return [name for name in found if name != MEAN]


def miss_score(results: Results, arm: str) -> float | None:
    """What the best arm is chosen by: LRU misses relative to base, mean over the headline sizes."""
    changes = [miss_change(results, arm, size) for size in headline_sizes(results)]
    if not changes or any(part is None for part in changes):
        return None
    return statistics.fmean(part.mean for part in changes if part is not None)


def verdict(results: Results) -> Verdict:
    """Which arm has the fewest LRU misses at no more than `PERPLEXITY_LIMIT`, and which costs least perplexity."""
    costs = {arm: change(results, arm, "perplexity", MEAN) for arm in tuned_arms(results)}
    cost = {arm: found.spread.mean for arm, found in costs.items() if found is not None}
    scores = {arm: score for arm in cost if (score := miss_score(results, arm)) is not None}
    within = [arm for arm in scores if cost[arm] <= PERPLEXITY_LIMIT]
    return Verdict(
        best=min(within, key=lambda arm: scores[arm], default=None),
        closest=min(cost, key=lambda arm: cost[arm], default=None),
    )


def _rows(results: Results, part: str) -> Iterable[dict[str, Any]]:
    return (row for arm in results["arms"] for run in runs_of(results, arm) for row in run[part] or [])
