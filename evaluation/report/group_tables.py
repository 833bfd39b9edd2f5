"""The report's table on kinds of text: what each domain, task or file did to the cache, beside its score."""

from collections.abc import Callable, Sequence

from evaluation.report import summary
from evaluation.report.numbers import CHANGE, COUNT, MILLISECONDS, MISSING, PERCENT, PLAIN, RATE, Unit, bytes_text
from evaluation.report.summary import Number, SeedMean, relative_change, seed_mean
from evaluation.report.tables import Table, budget_text
from evaluation.results import BASE, GroupDecode, GroupRouting, Results

Write = Callable[[SeedMean | None], str]


def group_table(results: Results) -> Table:
    """One row per group and arm: reuse and replayed misses of its text, then what decoding its prompts read and took."""
    sizes, budget = summary.headline_sizes(results), summary.headline_budget(results)
    names = list(dict.fromkeys(name for arm in results.arms for found in _routings(results, arm) for name in found))
    header = ["group", "arm", "score", "tokens", "EOR", *(f"LRU misses\nC = {size}" for size in sizes)]
    note = "Under a number: its change against base. Misses are replayed, cold at every request."
    if budget is not None:
        header += ["hit rate\nprefill", "hit rate\ndecode", "experts / token", "bytes / token", "TTFT", "TPOT"]
        note += (
            f" From the hit rates on: decoded with a cache of {bytes_text(budget)} ({budget_text(results, budget)})."
        )
    rows = [[name, arm, *_cells(results, name, arm, sizes, budget)] for name in names for arm in results.arms]
    return Table("By kind of text", header, rows, note, text_columns=2)


def _cells(results: Results, name: str, arm: str, sizes: Sequence[int], budget: int | None) -> list[str]:
    def routed(value_of: Callable[[GroupRouting], Number], write: Write) -> str:
        of_arm, of_base = (
            [value_of(found[name]) for found in _routings(results, one) if name in found] for one in (arm, BASE)
        )
        return _beside(of_arm, of_base, write, is_base=arm == BASE)

    def decoded(value_of: Callable[[GroupDecode], Number], write: Write) -> str:
        of_arm, of_base = (
            [value_of(row.groups[name]) for row in summary.decodes(results, one, budget or 0) if name in row.groups]
            for one in (arm, BASE)
        )
        return _beside(of_arm, of_base, write, is_base=arm == BASE)

    scores = [q.tasks[name] for q in summary.qualities(results, arm) if name in q.tasks]
    unit: Unit = PLAIN if scores and not scores[0].is_rate else RATE
    cells = [unit.over_seeds(seed_mean(score.value for score in scores)) if scores else MISSING]
    cells.append(
        COUNT.over_seeds(seed_mean(found[name].n_tokens for found in _routings(results, arm) if name in found))
    )
    cells.append(routed(lambda found: found.reuse_rate_mean, RATE.over_seeds))
    for size in sizes:
        cells.append(routed(lambda found, size=size: found.lru_miss_rates.get(str(size)), PERCENT.over_seeds))  # type: ignore[misc]
    if budget is None:
        return cells
    few = Unit(digits=1)
    return [
        *cells,
        decoded(lambda found: found.hit_rate.prefill, PERCENT.over_seeds),
        decoded(lambda found: found.hit_rate.decode, PERCENT.over_seeds),
        decoded(lambda found: found.experts_read_per_token, few.over_seeds),
        decoded(lambda found: found.bytes_read_per_token, bytes_text),
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
