"""The report's tables on kinds of text: what each domain, task or file did to the cache, beside its score."""

from collections.abc import Callable, Sequence
from functools import partial

from evaluation.report import summary
from evaluation.report.numbers import CHANGE, COUNT, MILLISECONDS, PERCENT, PLAIN, RATE, Unit, bytes_text
from evaluation.report.summary import Number, SeedMean, relative_change, seed_mean
from evaluation.report.tables import Table, budget_text
from evaluation.results import BASE, GroupDecode, GroupRouting, Results

Write = Callable[[SeedMean | None], str]


def group_tables(results: Results) -> list[Table]:
    """A row per group and arm: reuse and replayed misses of its text; what decoding its prompts read and took."""
    sizes, budget = summary.headline_sizes(results), summary.headline_budget(results)
    names = list(dict.fromkeys(name for arm in results.arms for found in _routings(results, arm) for name in found))
    header = ["group", "arm", "score", "tokens", "EOR", *(f"LRU misses\nC = {size}" for size in sizes)]
    rows = [[name, arm, *_text_cells(results, name, arm, sizes)] for name in names for arm in results.arms]
    note = "Under a number: its change against base. Misses are replayed, cold at every request."
    tables = [Table("By kind of text", header, rows, note, text_columns=2)]
    if budget is not None:
        header = [
            "group",
            "arm",
            "hit rate\nprefill",
            "hit rate\ndecode",
            "experts / token",
            "bytes / token",
            "TTFT",
            "TPOT",
        ]
        rows = [[name, arm, *_decode_cells(results, name, arm, budget)] for name in names for arm in results.arms]
        note = f"Decoded with a cache of {bytes_text(budget)} ({budget_text(results, budget)}); times are means."
        tables.append(Table("By kind of prompt", header, rows, note, text_columns=2))
    return tables


def _text_cells(results: Results, name: str, arm: str, sizes: Sequence[int]) -> list[str]:
    def cell(value_of: Callable[[GroupRouting], Number], write: Write) -> str:
        of_arm, of_base = (
            [value_of(found[name]) for found in _routings(results, one) if name in found] for one in (arm, BASE)
        )
        return _beside(of_arm, of_base, write, is_base=arm == BASE)

    scores = [q.tasks[name] for q in summary.qualities(results, arm) if name in q.tasks]
    unit: Unit = PLAIN if scores and not scores[0].is_rate else RATE
    tokens = seed_mean(found[name].n_tokens for found in _routings(results, arm) if name in found)
    return [
        unit.over_seeds(seed_mean(score.value for score in scores)),
        COUNT.over_seeds(tokens),
        cell(lambda found: found.reuse_rate_mean, RATE.over_seeds),
        *(cell(partial(_miss_rate, size=size), PERCENT.over_seeds) for size in sizes),
    ]


def _miss_rate(found: GroupRouting, *, size: int) -> Number:
    return found.lru_miss_rates.get(str(size))


def _decode_cells(results: Results, name: str, arm: str, budget: int) -> list[str]:
    def cell(value_of: Callable[[GroupDecode], Number], write: Write) -> str:
        of_arm, of_base = (
            [value_of(row.groups[name]) for row in summary.decodes(results, one, budget) if name in row.groups]
            for one in (arm, BASE)
        )
        return _beside(of_arm, of_base, write, is_base=arm == BASE)

    return [
        cell(lambda found: found.hit_rate.prefill, PERCENT.over_seeds),
        cell(lambda found: found.hit_rate.decode, PERCENT.over_seeds),
        cell(lambda found: found.experts_read_per_token, Unit(digits=1).over_seeds),
        cell(lambda found: found.bytes_read_per_token, bytes_text),
        _mean_time(results, name, arm, budget, "mean_ttft_ms"),
        _mean_time(results, name, arm, budget, "mean_tpot_ms"),
    ]


def _beside(values: Sequence[Number], of_base: Sequence[Number], write: Write, *, is_base: bool) -> str:
    """The value over seeds, on a second line its change against base."""
    base, text = seed_mean(of_base), write(seed_mean(values))
    if is_base or base is None:
        return text
    change = seed_mean(relative_change(value, base.mean) for value in values)
    return text if change is None else f"{text}\n{CHANGE.over_seeds(change)}"


def _mean_time(results: Results, name: str, arm: str, budget: int, key: str) -> str:
    """A group has few prompts: no change of a time is claimed."""
    rows = [row.groups[name] for row in summary.decodes(results, arm, budget) if name in row.groups]
    return MILLISECONDS.over_seeds(seed_mean(getattr(row, key) for row in rows))


def _routings(results: Results, arm: str) -> list[dict[str, GroupRouting]]:
    return [routing.groups for routing in summary.routings(results, arm)]
