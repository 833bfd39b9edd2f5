"""The report's tables as text cells, the same for Markdown and HTML; quality and budgets have files of their own.

A line break in a cell starts a second, lesser line.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

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
    data_size,
    demands_text,
)
from evaluation.report.summary import Number, SeedMean, Time, seed_mean
from evaluation.report.wording import LIMIT_TEXT, decode_policy, machine_sentence, time_change
from evaluation.results import BASE, Results, Run
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
        f"Chance EOR is {RATE.over_seeds(summary.routed(results, BASE, lambda routing: routing.chance_reuse_rate))}. "
        f"Marked: the arm with the fewest LRU misses among those within {LIMIT_TEXT} mean perplexity."
    )
    if budget is not None:
        at = f"at {_budget(results, budget)}"
        header += [f"bytes / token\n{at}", f"TPOT\n{at}"]
        note += (
            " TPOT: median, least to most, change. LRU misses are replayed; bytes and times are of real decoding (cache: "
            f"{decode_policy(results)})."
        )
        note += f" {machine_sentence(results)}"
    rows = [_headline_row(results, arm, sizes, budget) for arm in results.arms]
    return Table("Headline", header, rows, note.rstrip(), marked=summary.verdict(results).best)


def _headline_row(results: Results, arm: str, sizes: Sequence[int], budget: int | None) -> list[str]:
    n = len(results.arms[arm].runs)
    row = [arm if n == 1 else f"{arm}\nn = {n}", _beside_base(results, arm, RATE.over_seeds, summary.reuse_rate)]
    row += [_beside_base(results, arm, PERCENT.over_seeds, partial(summary.miss_rate, slots=size)) for size in sizes]
    if arm == BASE:
        row.append(PLAIN.over_seeds(summary.scored(results, arm, lambda quality: quality.mean_perplexity)))
    else:
        row.append(FINE_CHANGE.change(summary.perplexity_change(results, arm)))
    worst = summary.worst_task(results, arm)
    row.append(MISSING if worst is None else f"{POINTS.change(worst[1])}\n{worst[0]}")
    if budget is not None:
        row.append(_bytes_cell(results, arm, budget))
        row.append(_time_cell(results, arm, budget, "tpot_ms"))
    return row


def _beside_base(
    results: Results, arm: str, write: Callable[[SeedMean | None], str], value_of: Callable[[Run], Number]
) -> str:
    """The value over seeds, on a second line its change against base."""
    text = write(seed_mean(map(value_of, results.arms[arm].runs)))
    against = summary.over_base(results, arm, value_of)
    return text if against is None else f"{text}\n{CHANGE.over_seeds(against)}"


def _bytes_cell(results: Results, arm: str, budget: int) -> str:
    return _beside_base(
        results, arm, bytes_text, lambda run: summary.decode_value(run, budget, lambda row: row.bytes_read_per_token)
    )


def _time_cell(results: Results, arm: str, budget: int, time: Time) -> str:
    """Median, least and most of all turns, below them the change against base; else the mean that was kept."""
    found = extent(summary.turn_times(results, arm, budget, time))
    if found is None:
        return MILLISECONDS.over_seeds(summary.decoded(results, arm, budget, lambda row: getattr(row, f"mean_{time}")))
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
    policies = summary.replay_policies(results)
    accesses = seed_mean(row.accesses for run in results.arms[BASE].runs for row in run.replay or [])
    note = f"Of all accesses ({COUNT.over_seeds(accesses)} in base); C slots per layer, cold at every request."
    without_first = partial(summary.miss_rate, first_touches=False)
    online = [policy for policy in policies if policy != "belady"]
    return [
        _by_size(results, "Miss rate", PERCENT, summary.miss_rate, policies, note),
        _by_size(results, "Miss rate without first touches", PERCENT, without_first, policies, note),
        _by_size(
            results, "Policy regret", PLAIN, summary.policy_regret, online, "Misses / Belady's misses; 1 is optimal."
        ),
    ]


def _by_size(
    results: Results,
    title: str,
    unit: Unit,
    value_of: Callable[[Run, int, str], Number],
    policies: Sequence[str],
    note: str,
) -> Table:
    sizes = summary.replay_sizes(results)
    rows = []
    for arm, measured in results.arms.items():
        for policy in policies:
            means = [seed_mean(value_of(run, size, policy) for run in measured.runs) for size in sizes]
            rows.append([arm, policy, *map(unit.over_seeds, means)])
    return Table(title, ["arm", "policy", *(f"C = {size}" for size in sizes)], rows, note, text_columns=2)


def decode_table(results: Results) -> Table:
    """Hits, bytes and times of real decoding, one row per cache size and arm."""
    header = ["arm", "expert cache", "hit rate\nprefill", "hit rate\ndecode", "bytes / token"]
    header += ["TTFT\nmedian, least to most", "TPOT\nmedian, least to most", "tokens / s"]
    rows = [
        [arm, *_decode_cells(results, arm, budget)]
        for budget in summary.decode_budgets(results)
        for arm in results.arms
        if any(summary.decode_row(run, budget) for run in results.arms[arm].runs)
    ]
    all_rows = summary.decode_rows(results)
    prompts, tokens = (
        COUNT.over_seeds(seed_mean(getattr(row, key) for row in all_rows)) for key in ("n_prompts", "n_tokens")
    )
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
    compared = [
        row.tokens_equal_resident for row in summary.decode_rows(results) if row.tokens_equal_resident is not None
    ]
    if not compared:
        return ""
    if all(compared):
        return "Every token is the one of the same model with all experts in memory."
    different = f"In {compared.count(False)} of {len(compared)} decodes tokens differ"
    return f"{different} from those of the same model with all experts in memory."


def _decode_cells(results: Results, arm: str, budget: int) -> list[str]:
    demands = summary.decoded(results, arm, budget, lambda row: row.demands)
    return [
        f"{data_size(budget).text(budget)}\n{demands_text(None if demands is None else demands.mean)}",
        PERCENT.over_seeds(summary.decoded(results, arm, budget, lambda row: row.hit_rate.prefill)),
        PERCENT.over_seeds(summary.decoded(results, arm, budget, lambda row: row.hit_rate.decode)),
        bytes_text(summary.decoded(results, arm, budget, lambda row: row.bytes_read_per_token)),
        _time_cell(results, arm, budget, "ttft_ms"),
        _time_cell(results, arm, budget, "tpot_ms"),
        Unit(digits=1).over_seeds(summary.decoded(results, arm, budget, lambda row: row.output_throughput)),
    ]


def balance_table(results: Results) -> Table:
    """How evenly experts are used, one row per arm."""
    header = ["arm", "tokens", "loss\nnats / token", "entropy\nmean, nats", "entropy\nlowest layer"]
    header += ["CV\nmean", "CV\nhighest layer", "dead experts"]
    rows = [_balance_row(results, arm) for arm in results.arms]
    note = "Dead experts: all layers together, mean over seeds."
    return Table("Balance of expert loads", header, rows, note)


def _balance_row(results: Results, arm: str) -> list[str]:
    entropies = _means(summary.layer_means(results, arm, lambda routing: routing.load_entropy_per_layer))
    variations = _means(summary.layer_means(results, arm, lambda routing: routing.load_cv_per_layer))
    evenness = [_mean(entropies), min(entropies, default=None), _mean(variations), max(variations, default=None)]
    dead = [run.routing.dead_experts_per_layer for run in results.arms[arm].runs if run.routing]
    totals = [sum(layer or 0 for layer in layers) for layers in dead if layers and None not in layers]
    return [
        arm,
        COUNT.over_seeds(summary.routed(results, arm, lambda routing: routing.n_tokens)),
        RATE.over_seeds(summary.routed(results, arm, lambda routing: routing.nll)),
        *map(PLAIN.text, evenness),
        _few(seed_mean(totals)),
    ]


def layer_table(results: Results) -> Table:
    """Every measure of the routing, layer by layer."""
    rows = []
    for arm in results.arms:
        reuse = summary.layer_means(results, arm, lambda routing: routing.reuse_rate_per_layer)
        entropy = summary.layer_means(results, arm, lambda routing: routing.load_entropy_per_layer)
        variation = summary.layer_means(results, arm, lambda routing: routing.load_cv_per_layer)
        dead = summary.layer_means(results, arm, lambda routing: routing.dead_experts_per_layer)
        rows += [[arm, "EOR", *map(RATE.over_seeds, reuse)]] if reuse else []
        rows += [[arm, "entropy", *map(PLAIN.over_seeds, entropy)]] if entropy else []
        rows += [[arm, "CV", *map(PLAIN.over_seeds, variation)]] if variation else []
        rows += [[arm, "dead experts", *map(_few, dead)]] if dead else []
    n_layers = max((len(row) - 2 for row in rows), default=0)
    header = ["arm", "measure", *(f"layer {layer}" for layer in range(n_layers))]
    return Table("Per layer", header, [[*row, *[MISSING] * (n_layers + 2 - len(row))] for row in rows], text_columns=2)


def _means(layers: Sequence[SeedMean | None]) -> list[float]:
    return [layer.mean for layer in layers if layer is not None]


def _mean(values: Sequence[float]) -> Number:
    found = seed_mean(values)
    return None if found is None else found.mean


def _few(count: SeedMean | None) -> str:
    """A small count, with decimals only where seeds differ."""
    return MISSING if count is None else f"{count.mean:.3g}"


def _budget(results: Results, budget: int) -> str:
    demand = results.model.token_demand_bytes
    return data_size(budget).text(budget) if not demand else f"{demands_text(budget / demand)} demand"
