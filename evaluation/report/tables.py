"""The report's tables as text cells, the same for Markdown and HTML; those on quality are in `quality_tables.py`.

A line break in a cell starts a second, lesser line.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from evaluation.report.summary import (
    MEAN,
    SCOPE,
    Spread,
    budgets,
    change,
    decode_row,
    decode_value,
    headline_budget,
    headline_sizes,
    layers_of,
    measure,
    miss_rate,
    over_base,
    pick,
    replay_policies,
    replay_row,
    replay_sizes,
    reuse_rate,
    runs_of,
    spread,
    verdict,
    worst_task,
)
from evaluation.report.wording import (
    CHANGE,
    COUNT,
    FINE_CHANGE,
    LIMIT_TEXT,
    MILLISECONDS,
    MISSING,
    PERCENT,
    PLAIN,
    POINTS,
    RATE,
    Unit,
    bytes_text,
    data_size,
    demands_text,
)
from evaluation.results import BASE, Results, Run


@dataclass(frozen=True)
class Table:
    """`text_columns` leading columns hold words, the rest numbers. `marked` is the first cell of rows to set off."""

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""
    text_columns: int = 1
    marked: str | None = None


def headline_table(results: Results) -> Table:
    sizes, budget = headline_sizes(results), headline_budget(results)
    header = ["arm", "EOR", *(f"LRU misses\nC = {size}" for size in sizes), "mean perplexity", "worst task"]
    if budget is not None:
        header += [f"bytes / token\nat {_budget(results, budget)}", f"TPOT\nat {_budget(results, budget)}"]
    rows = [_headline_row(results, arm, sizes, budget) for arm in results["arms"]]
    chance = measure(results, BASE, "routing", "chance_reuse_rate")
    note = (
        "Second lines are changes against base; under perplexity and worst task the 95 % interval. "
        f"Chance EOR is {RATE.spread(chance)}. "
        f"Marked: the arm with the fewest LRU misses among those within {LIMIT_TEXT} mean perplexity."
    )
    return Table("Headline", header, rows, note, marked=verdict(results).best)


def _headline_row(results: Results, arm: str, sizes: Sequence[int], budget: int | None) -> list[str]:
    n = len(runs_of(results, arm))
    row = [arm if n == 1 else f"{arm}\nn = {n}", _beside_base(results, arm, RATE.spread, reuse_rate)]
    row += [_beside_base(results, arm, PERCENT.spread, partial(miss_rate, slots=size)) for size in sizes]
    if arm == BASE:
        row.append(PLAIN.spread(measure(results, arm, "quality", "mean_perplexity")))
    else:
        row.append(FINE_CHANGE.change(change(results, arm, "perplexity", MEAN)))
    worst = worst_task(results, arm)
    row.append(MISSING if worst is None else f"{POINTS.change(worst[1])}\n{worst[0]}")
    if budget is not None:
        row.append(
            _beside_base(results, arm, bytes_text, lambda run: decode_value(run, budget, "bytes_read_per_token"))
        )
        row.append(
            _beside_base(results, arm, MILLISECONDS.spread, lambda run: decode_value(run, budget, "mean_tpot_ms"))
        )
    return row


def _beside_base(
    results: Results, arm: str, write: Callable[[Spread | None], str], value_of: Callable[[Run], float | None]
) -> str:
    """The value over seeds, on a second line its change against base."""
    text = write(spread(map(value_of, runs_of(results, arm))))
    against = over_base(results, arm, value_of)
    return text if against is None else f"{text}\n{CHANGE.spread(against)}"


def arms_table(results: Results) -> Table:
    rows = []
    for name, arm in results["arms"].items():
        seeds = ", ".join(COUNT.text(run["seed"]) for run in arm["runs"])
        coefficients = ", ".join(f"{key} {value}" for key, value in arm["coefficients"].items() if value is not None)
        steps = [row.get("train/global_step") or 0 for run in arm["runs"] for row in run["history"] or []]
        rows.append(
            [name, arm["objective"] or "untouched", coefficients or MISSING, seeds, str(max(steps, default=MISSING))]
        )
    return Table("Arms", ["arm", "objective", "coefficients", "seeds", "steps"], rows, text_columns=3)


def miss_tables(results: Results) -> list[Table]:
    """Miss rate with and without first touches, and regret: a row per arm and policy, a column per size."""
    sizes = replay_sizes(results)

    def rows(unit: Unit, value_of: Any, *, skip: str | None = None) -> list[list[str]]:
        return [
            [
                arm,
                policy,
                *(unit.spread(spread(value_of(run, size, policy) for run in runs_of(results, arm))) for size in sizes),
            ]
            for arm in results["arms"]
            for policy in replay_policies(results)
            if policy != skip
        ]

    def without_first(run: Run, size: int, policy: str) -> float | None:
        return miss_rate(run, size, policy=policy, key="misses_without_first_touches")

    def regret(run: Run, size: int, policy: str) -> float | None:
        value: float | None = pick(replay_row(run, policy, size), "policy_regret")
        return value

    header = ["arm", "policy", *(f"C = {size}" for size in sizes)]
    accesses = spread(
        row["accesses"] for run in runs_of(results, BASE) for row in run["replay"] or [] if row["cache_scope"] == SCOPE
    )
    note = f"Of all accesses ({COUNT.spread(accesses)} in base); C slots per layer, cold at every request."
    return [
        Table(
            "Miss rate", header, rows(PERCENT, lambda run, size, policy: miss_rate(run, size, policy=policy)), note, 2
        ),
        Table("Miss rate without first touches", header, rows(PERCENT, without_first), note, 2),
        Table(
            "Policy regret", header, rows(PLAIN, regret, skip="belady"), "Misses / Belady's misses; 1 is optimal.", 2
        ),
    ]


def decode_table(results: Results) -> Table:
    header = [
        "arm",
        "expert cache",
        "hit rate\nprefill",
        "hit rate\ndecode",
        "bytes / token",
        "TTFT",
        "TPOT",
        "tokens / s",
    ]
    rows = [
        [arm, *_decode_cells(results, arm, budget)]
        for budget in budgets(results)
        for arm in results["arms"]
        if any(decode_row(run, budget) for run in runs_of(results, arm))
    ]
    decoded = [row for arm in results["arms"] for run in runs_of(results, arm) for row in run["decode"] or []]
    prompts, tokens = (COUNT.spread(spread(row[key] for row in decoded)) for key in ("n_prompts", "n_tokens"))
    note = (
        f"Each row: {prompts} prompts, {tokens} generated tokens, one request at a time, experts on disk.{_turns(decoded)} "
        f"Under the cache size: how many times one token's demand it holds.{_exactness(decoded)}"
    )
    return Table("Decode under a memory budget", header, rows, note)


def _turns(decoded: Sequence[Run]) -> str:
    """How far times may be compared: a machine is quicker in one minute than in another."""
    if not all("repeats" in row for row in decoded):
        return ""
    repeats = COUNT.spread(spread(row["repeats"] for row in decoded))
    return f" Times: means of {repeats} repeats, the models taking turns at each cache size."


def _exactness(decoded: Sequence[Run]) -> str:
    """Whether paging changed a token, where that was compared."""
    compared = [row["tokens_equal_resident"] for row in decoded if row.get("tokens_equal_resident") is not None]
    if not compared:
        return ""
    if all(compared):
        return " Every token is the one of the same model with all experts in memory."
    different = f"In {compared.count(False)} of {len(compared)} decodes tokens differ"
    return f" {different} from those of the same model with all experts in memory."


def _decode_cells(results: Results, arm: str, budget: int) -> list[str]:
    def value(*path: str) -> Spread | None:
        return spread(decode_value(run, budget, *path) for run in runs_of(results, arm))

    demands = value("demands")
    return [
        f"{data_size(budget).text(budget)}\n{demands_text(None if demands is None else demands.mean)}",
        PERCENT.spread(value("hit_rate", "prefill")),
        PERCENT.spread(value("hit_rate", "decode")),
        bytes_text(value("bytes_read_per_token")),
        MILLISECONDS.spread(value("mean_ttft_ms")),
        MILLISECONDS.spread(value("mean_tpot_ms")),
        Unit(digits=1).spread(value("output_throughput")),
    ]


def routing_tables(results: Results) -> list[Table]:
    """Balance per arm, then every measure per layer."""
    rows, layer_rows = [], []
    n_layers = 0
    for arm in results["arms"]:
        entropies, variations, dead, reuse = (
            _by_layer(results, arm, key)
            for key in ("load_entropy_per_layer", "load_cv_per_layer", "dead_experts_per_layer", "reuse_rate_per_layer")
        )
        seen, loss = (measure(results, arm, "routing", key) for key in ("n_tokens", "nll"))
        balance = [_mean(entropies), _end(entropies, min), _mean(variations), _end(variations, max)]
        rows.append([arm, COUNT.spread(seen), RATE.spread(loss), *map(PLAIN.text, balance), _dead(results, arm)])
        layer_rows += [[arm, "EOR", *map(RATE.spread, reuse)]] if reuse else []
        layer_rows += [[arm, "entropy", *map(PLAIN.spread, entropies)]] if entropies else []
        layer_rows += [[arm, "CV", *map(PLAIN.spread, variations)]] if variations else []
        layer_rows += [[arm, "dead experts", *map(_few, dead)]] if dead else []
        n_layers = max(n_layers, len(reuse), len(entropies))
    header = ["arm", "tokens", "loss\nnats / token", "entropy\nmean, nats", "entropy\nlowest layer"]
    header += ["CV\nmean", "CV\nhighest layer", "dead experts"]
    return [
        Table("Balance of expert loads", header, rows, "Dead experts: all layers together, mean over seeds."),
        Table(
            "Per layer",
            ["arm", "measure", *(f"layer {layer}" for layer in range(n_layers))],
            layer_rows,
            text_columns=2,
        ),
    ]


def _by_layer(results: Results, arm: str, key: str) -> list[Spread | None]:
    return layers_of([pick(run, "routing", key) or [] for run in runs_of(results, arm)])


def _mean(layers: Sequence[Spread | None]) -> float | None:
    found = spread(None if layer is None else layer.mean for layer in layers)
    return None if found is None else found.mean


def _end(layers: Sequence[Spread | None], which: Any) -> float | None:
    found: float | None = which((layer.mean for layer in layers if layer is not None), default=None)
    return found


def _dead(results: Results, arm: str) -> str:
    totals = (pick(run, "routing", "dead_experts_per_layer") for run in runs_of(results, arm))
    found = spread(None if total is None or None in total else sum(total) for total in totals)
    return _few(found)


def _few(count: Spread | None) -> str:
    """A small count, with decimals only where seeds differ."""
    return MISSING if count is None else f"{count.mean:.3g}"


def _budget(results: Results, budget: int) -> str:
    demand = results["model"]["token_demand_bytes"]
    return data_size(budget).text(budget) if not demand else f"{demands_text(budget / demand)} demand"
