"""What the report says in sentences that follow the results; what it always says is in `templates/prose.yaml`."""

from dataclasses import replace

from evaluation.report import summary
from evaluation.report.numbers import CHANGE, FINE_CHANGE, MISSING, PERCENT, PLAIN, POINTS, Unit
from evaluation.report.summary import BUSY_SHARE, PERPLEXITY_LIMIT, SeedMean
from evaluation.results import Results
from evaluation.turns import PairedRatio

LIMIT_TEXT = replace(CHANGE, digits=0).text(PERPLEXITY_LIMIT)
NO_DIFFERENCE = "no difference that shows"
SCOPES = {"global": "one pool for all layers", "per_layer": "a pool for each layer"}


def headline(results: Results) -> str:
    """What the best arm won and cost, or why there is none; and that a lever was used."""
    if results.lever is None:
        return _headline(results)
    return f"Generated and decoded with the lever {results.lever}, which changes outputs. {_headline(results)}"


def _headline(results: Results) -> str:
    if not summary.tuned_arms(results):
        return "Only the untouched model was measured: there is no tuned arm to compare it with."
    costs = summary.perplexity_costs(results)
    if not costs:
        return "No arm's mean perplexity was compared with base, so none can be called the best."
    if best := summary.best_arm(results):
        return _praise(results, best, costs[best])
    closest, cost = min(costs.items(), key=lambda item: item[1].mean)
    cheapest = f"the cheapest, {closest}, is at {FINE_CHANGE.over_seeds(cost)}"
    if cost.mean > PERPLEXITY_LIMIT:
        return f"No arm keeps mean perplexity within {LIMIT_TEXT} of base: {cheapest}."
    return f"No arm within {LIMIT_TEXT} mean perplexity had its cache misses measured; {cheapest}."


def _praise(results: Results, arm: str, cost: SeedMean) -> str:
    sizes = summary.headline_sizes(results)
    saved = {size: found for size in sizes if (found := summary.miss_change(results, arm, size))}
    parts: list[str] = []
    for size, found in saved.items():
        more = "fewer" if found.mean < 0 else "more"
        what = f"{more} with {size}" if parts else f"{more} expert loads than base with {size} LRU slots per layer"
        parts.append(f"{_size(found, PERCENT)} {what}")
    seeds = f" ({cost.n} seeds)" if cost.n > 1 else ""
    gained = all(found.mean < 0 for found in saved.values())
    opening = "The best arm" if gained else "No arm within the limit saves loads at every size; the best of them"
    return (
        f"{opening}, {arm}{seeds}, needs {' and '.join(parts)}, at {FINE_CHANGE.over_seeds(cost)} mean perplexity "
        f"(limit {LIMIT_TEXT}); {_tasks(results, arm)}."
    )


def _tasks(results: Results, arm: str) -> str:
    measured = summary.task_changes(results, arm)
    if not measured:
        return "no task was compared"
    falls = {task: measured[task].value for task in summary.certain(measured) if measured[task].value.mean < 0}
    if falls:
        return "but " + ", ".join(f"{task} falls by {_size(fall, POINTS)}" for task, fall in falls.items())
    lows = {task: found.low for task, found in measured.items() if found.low is not None}
    if not lows:
        return "no task falls as far as can be seen: none has an interval"
    widest = min(lows, key=lambda task: lows[task])
    hidden = replace(POINTS, signed=False).text(max(0.0, -lows[widest]))
    return f"no task falls beyond chance, and no loss larger than {hidden} ({widest}) can be hidden in so few items"


def _size(value: SeedMean, unit: Unit) -> str:
    """Without its sign, for sentences that say the direction in words."""
    return replace(unit, signed=False).over_seeds(replace(value, mean=abs(value.mean)))


def time_change(ratio: PairedRatio | None) -> str:
    """`−14.2 % [−16.0, −12.1]` where the interval excludes no difference, otherwise that none shows."""
    if ratio is None:
        return MISSING
    if not ratio.shows or ratio.low is None or ratio.high is None:
        return NO_DIFFERENCE
    return f"{CHANGE.text(ratio.median - 1)} [{CHANGE.bare(ratio.low - 1)}, {CHANGE.bare(ratio.high - 1)}]"


def decode_policy(results: Results) -> str:
    """The cache policy of the live decode and its pools, as `decayed, one pool for all layers`."""
    used = {(row.cache_policy, row.cache_scope, row.lever) for row in summary.decode_rows(results)}
    named = sorted(
        f"{policy}, {SCOPES.get(scope, scope)}" + ("" if lever is None else f", lever {lever}")
        for policy, scope, lever in used
        if policy and scope
    )
    return " and ".join(named) or "policy not noted"


def machine_sentence(results: Results) -> str:
    """How busy the machine was while models were decoded, and what follows for the times; empty if nobody looked."""
    load = results.machine_load
    if load is None:
        return ""
    facts = (
        f"While models were decoded, other processes had {PERCENT.text(load.others_share)} of the processors' time and the "
        f"hypervisor took {PERCENT.text(load.stolen_share)} (load average {PLAIN.text(load.load_average_before)} before, "
        f"{PLAIN.text(load.load_average_after)} after)"
    )
    if summary.is_busy(results):
        return f"{facts}: the machine was busy with other work, more than {PERCENT.text(BUSY_SHARE)}: times say little."
    return f"{facts}."
