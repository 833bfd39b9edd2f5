"""The report's tables as text cells, the same for Markdown and HTML; quality and budgets have files of their own.

A line break in a cell starts a second, lesser line.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from statistics import fmean

from evaluation.report import summary
from evaluation.report.numbers import (
    CHANGE,
    COUNT,
    FINE_CHANGE,
    MILLISECONDS,
    MISSING,
    PERCENT,
    PLAIN,
    POINTS,
    RATE,
    Unit,
    bytes_text,
    demands_text,
)
from evaluation.report.summary import Number, SeedMean, Time, place_means, seed_mean
from evaluation.report.wording import LIMIT_TEXT, decode_policy, machine_sentence, time_change
from evaluation.results import BASE, Results, Routing, Run
from evaluation.turns import extent


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
    """What matters most, one row per arm."""
    sizes, budget = summary.headline_sizes(results), summary.headline_budget(results)
    header = ["arm", "EOR", *(f"LRU misses\nC = {size}" for size in sizes), "mean perplexity", "worst task"]
    note = (
        "Lesser lines are changes against base; under perplexity and worst task the 95 % interval. "
        f"Chance EOR is {RATE.over_seeds(summary.chance_reuse_rate(results))}. "
        f"Marked: the arm with the fewest LRU misses among those within {LIMIT_TEXT} mean perplexity."
    )
    if budget is not None:
        at = f"at {budget_text(results, budget)}"
        header += [f"bytes / token\n{at}", f"TPOT\n{at}"]
        note += (
            " TPOT: median, least to most, change. LRU misses are replayed; bytes and times are of real decoding (cache: "
            f"{decode_policy(results)}). {machine_sentence(results)}"
        )
    rows = [_headline_row(results, arm, sizes, budget) for arm in results.arms]
    return Table("Headline", header, rows, note.rstrip(), marked=summary.best_arm(results))


def _headline_row(results: Results, arm: str, sizes: Sequence[int], budget: int | None) -> list[str]:
    n = len(results.arms[arm].runs)
    row = [arm if n == 1 else f"{arm}\nn = {n}", _beside_base(results, arm, RATE.over_seeds, summary.reuse_rate)]
    row += [_beside_base(results, arm, PERCENT.over_seeds, partial(summary.miss_rate, slots=size)) for size in sizes]
    if arm == BASE:
        row.append(PLAIN.over_seeds(summary.mean_perplexity(results, arm)))
    else:
        row.append(FINE_CHANGE.change(summary.perplexity_change(results, arm)))
    worst = summary.worst_task(results, arm)
    row.append(MISSING if worst is None else f"{POINTS.change(worst[1])}\n{worst[0]}")
    if budget is not None:
        row.append(_beside_base(results, arm, bytes_text, partial(summary.bytes_per_token, budget_bytes=budget)))
        row.append(_time_cell(results, arm, budget, "tpot_ms"))
    return row


def _beside_base(
    results: Results, arm: str, write: Callable[[SeedMean | None], str], value_of: Callable[[Run], Number]
) -> str:
    """The value over seeds, on a second line its change against base."""
    text = write(seed_mean(map(value_of, results.arms[arm].runs)))
    against = summary.over_base(results, arm, value_of)
    return text if against is None else f"{text}\n{CHANGE.over_seeds(against)}"


def _time_cell(results: Results, arm: str, budget: int, time: Time) -> str:
    """Median, least and most of all turns, below them the change against base; else the mean that was kept."""
    found = extent(summary.turn_times(results, arm, budget, time))
    if found is None:
        rows = summary.decodes(results, arm, budget)
        return MILLISECONDS.over_seeds(seed_mean(getattr(row, f"mean_{time}") for row in rows))
    ratio = summary.time_ratio(results, arm, budget, time)
    return MILLISECONDS.extent(found) + ("" if ratio is None else f"\n{time_change(ratio)}")


def arms_table(results: Results) -> Table:
    """What each arm was trained for; settings that are 0 or off are left out."""
    rows = []
    for name, arm in results.arms.items():
        seeds = ", ".join(COUNT.text(run.seed) for run in arm.runs)
        settings = ", ".join(f"{key} {value}" for key, value in arm.coefficients.items() if value)
        steps = [record.get("train/global_step") or 0 for run in arm.runs for record in run.history or []]
        rows.append([name, arm.objective or "untouched", settings or MISSING, seeds, str(max(steps, default=MISSING))])
    return Table("Arms", ["arm", "objective", "settings", "seeds", "steps"], rows, text_columns=3)


def miss_tables(results: Results) -> list[Table]:
    """Miss rate with and without first touches, and regret: a row per arm and policy, a column per size."""
    sizes, policies = summary.replay_sizes(results), summary.replay_policies(results)
    header = ["arm", "policy", *(f"C = {size}" for size in sizes)]
    accesses = seed_mean(row.accesses for run in results.arms[BASE].runs for row in run.replay or [])
    note = f"Of all accesses ({COUNT.over_seeds(accesses)} in base); C slots per layer, cold at every request."

    def by_size(title: str, unit: Unit, value_of: Callable[[Run, int, str], Number], note: str = note) -> Table:
        rows = []
        for arm, policy in product(results.arms, policies):
            means = [seed_mean(value_of(run, size, policy) for run in results.arms[arm].runs) for size in sizes]
            rows.append([arm, policy, *map(unit.over_seeds, means)])
        return Table(title, header, rows, note, text_columns=2)

    without_first = partial(summary.miss_rate, first_touches=False)
    tables = [
        by_size("Miss rate", PERCENT, summary.miss_rate),
        by_size("Miss rate without first touches", PERCENT, without_first),
    ]
    regret = by_size("Policy regret", PLAIN, summary.policy_regret, "Misses / Belady's misses; 1 is optimal.")
    return [*tables, replace(regret, rows=[row for row in regret.rows if row[1] != "belady"])]


def decode_table(results: Results) -> Table:
    """Hits, bytes and times of real decoding, one row per cache size and arm."""
    header = ["arm", "expert cache", "hit rate\nprefill", "hit rate\ndecode", "bytes / token"]
    header += ["TTFT\nmedian, least to most", "TPOT\nmedian, least to most", "tokens / s"]
    rows = [
        [arm, *_decode_cells(results, arm, budget)]
        for budget in summary.decode_budgets(results)
        for arm in results.arms
        if summary.decodes(results, arm, budget)
    ]
    all_rows = summary.decode_rows(results)
    prompts = COUNT.over_seeds(seed_mean(row.n_prompts for row in all_rows))
    tokens = COUNT.over_seeds(seed_mean(row.n_tokens for row in all_rows))
    note = (
        f"Each row: {prompts} prompts, {tokens} generated tokens, one request at a time, experts on disk; cache: "
        f"{decode_policy(results)}. Under the cache size: how many times one token's demand it holds.",
        _turns(results),
        _exactness(results),
        machine_sentence(results),
    )
    return Table("Decode under a memory budget", header, rows, " ".join(filter(None, note)))


def _turns(results: Results) -> str:
    """How times were taken, and how they may be compared."""
    rows = summary.decode_rows(results)
    if not rows or not all(row.repeats for row in rows):
        return ""
    repeats = COUNT.over_seeds(seed_mean(row.repeats for row in rows))
    if not all(row.tpot_ms for row in rows):
        return f"Times: means of {repeats} repeats, the models taking turns at each cache size."
    return (
        f"Times: {repeats} repeats of every prompt, the models taking turns at each. Under a time: its change against base, "
        "the median of the ratios within a turn and its 95 % interval, where that excludes no difference."
    )


def _exactness(results: Results) -> str:
    """Whether paging changed a token, where that was compared."""
    all_rows = summary.decode_rows(results)
    compared = [equal for row in all_rows if (equal := row.tokens_equal_resident) is not None]
    if not compared:
        return ""
    if all(compared):
        return "Every token is the one of the same model with all experts in memory."
    different = f"In {compared.count(False)} of {len(compared)} decodes tokens differ"
    return f"{different} from those of the same model with all experts in memory."


def _decode_cells(results: Results, arm: str, budget: int) -> list[str]:
    rows = summary.decodes(results, arm, budget)
    demands = seed_mean(row.demands for row in rows)
    return [
        f"{bytes_text(budget)}\n{demands_text(demands.mean if demands else None)}",
        PERCENT.over_seeds(seed_mean(row.hit_rate.prefill for row in rows)),
        PERCENT.over_seeds(seed_mean(row.hit_rate.decode for row in rows)),
        bytes_text(seed_mean(row.bytes_read_per_token for row in rows)),
        _time_cell(results, arm, budget, "ttft_ms"),
        _time_cell(results, arm, budget, "tpot_ms"),
        Unit(digits=1).over_seeds(seed_mean(row.output_throughput for row in rows)),
    ]


def balance_table(results: Results) -> Table:
    """How evenly experts are used, one row per arm."""
    header = ["arm", "tokens", "loss\nnats / token", "entropy\nmean, nats", "entropy\nlowest layer"]
    header += ["CV\nmean", "CV\nhighest layer", "dead experts"]
    rows = [[arm, *_balance_cells(summary.routings(results, arm))] for arm in results.arms]
    return Table("Balance of expert loads", header, rows, "Dead experts: all layers together, mean over seeds.")


def _balance_cells(routings: Sequence[Routing]) -> list[str]:
    entropies = [layer.mean for layer in place_means(r.load_entropy_per_layer for r in routings) if layer]
    variations = [layer.mean for layer in place_means(r.load_cv_per_layer for r in routings) if layer]
    dead = [r.dead_experts_per_layer for r in routings]
    totals = [sum(layer or 0 for layer in layers) for layers in dead if layers and None not in layers]
    return [
        COUNT.over_seeds(seed_mean(r.n_tokens for r in routings)),
        RATE.over_seeds(seed_mean(r.nll for r in routings)),
        PLAIN.text(fmean(entropies) if entropies else None),
        PLAIN.text(min(entropies, default=None)),
        PLAIN.text(fmean(variations) if variations else None),
        PLAIN.text(max(variations, default=None)),
        _few(seed_mean(totals)),
    ]


def layer_table(results: Results) -> Table:
    """Every measure of the routing, layer by layer."""
    measures = (
        ("EOR", RATE.over_seeds, "reuse_rate_per_layer"),
        ("entropy", PLAIN.over_seeds, "load_entropy_per_layer"),
        ("CV", PLAIN.over_seeds, "load_cv_per_layer"),
        ("dead experts", _few, "dead_experts_per_layer"),
    )
    rows = []
    for arm, (measure, write, key) in product(results.arms, measures):
        layers = place_means(getattr(routing, key) for routing in summary.routings(results, arm))
        rows += [[arm, measure, *map(write, layers)]] if layers else []
    n_layers = max((len(row) - 2 for row in rows), default=0)
    header = ["arm", "measure", *(f"layer {layer}" for layer in range(n_layers))]
    return Table("Per layer", header, [[*row, *[MISSING] * (n_layers + 2 - len(row))] for row in rows], text_columns=2)


def _few(count: SeedMean | None) -> str:
    """A small count, with decimals only where seeds differ."""
    return MISSING if count is None else f"{count.mean:.3g}"


def budget_text(results: Results, budget: int) -> str:
    """A cache size in demands of one token, or in bytes if that is not known."""
    demand = results.model.token_demand_bytes
    return f"{demands_text(budget / demand)} demand" if demand else bytes_text(budget)
