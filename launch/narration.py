"""What long commands say while they run: one line for everything that was found, and a table at the end."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from evaluation.quality.cost import Cost
from evaluation.report.numbers import (
    CHANGE,
    COUNT,
    FINE_CHANGE,
    PERCENT,
    PLAIN,
    POINTS,
    RATE,
    SECONDS,
    bytes_text,
    demands_text,
)
from evaluation.report.summary import relative_change, seed_mean
from evaluation.report.tables import headline_table
from evaluation.results import BASE, MEAN, Decode, Results, Run

FACTORS = (1.5, 3)
"""A line names the cache sizes nearest to these multiples of the smallest, as the report's headline does."""


def say(text: str) -> None:
    """One line with the time of day, above a progress bar that may be drawn."""
    tqdm.write(f"{time.strftime('%H:%M:%S')}  {text}")
    sys.stdout.flush()


class Narration:
    """Says what was found of every run, beside the base as soon as that is known.

    Args:
        is_silent: for a process that is not the first of several.
    """

    def __init__(self, *, is_silent: bool = False) -> None:
        self._base: Run | None = None
        self._is_silent = is_silent

    def _say(self, text: str) -> None:
        if not self._is_silent:
            say(text)

    def expected(self, costs: Sequence[Cost]) -> None:
        """Show what asking the tasks will cost each model."""
        if self._is_silent:
            return
        columns = ["task", "requests", "tokens read", "written at most", "experts read at most", "at the disk's speed"]
        has_speed = any(cost.read_seconds is not None for cost in costs)
        table = Table(*columns[: 6 if has_speed else 5], title="what each model will be asked")
        for cost in costs:
            row = [COUNT.text(number) for number in (cost.requests, cost.prompt_tokens, cost.new_tokens)]
            row = [cost.name, *row, bytes_text(cost.read_bytes), SECONDS.text(cost.read_seconds)]
            table.add_row(*row[: len(table.columns)])
        Console(stderr=True).print(table)

    def found(self, arm: str, run: Run) -> None:
        """Say the routing of a run, or its quality once that was measured."""
        if arm == BASE and self._base is None:
            self._base = run
        seed = "" if run.seed is None else f", seed {run.seed}"
        self._say(f"{arm}{seed}: {self._routing(run) if run.quality is None else self._quality(run)}")

    def decoded(self, rows: Sequence[tuple[str, Decode]]) -> None:
        """Say what the base read with one size of cache, and how much more or less every arm did."""
        (_, base), *others = rows
        parts = [f"the base reads {bytes_text(base.bytes_read_per_token)} a token"]
        for arm in dict.fromkeys(name for name, _ in others):
            of_seeds = (row.bytes_read_per_token for name, row in others if name == arm)
            change = seed_mean(relative_change(read, base.bytes_read_per_token) for read in of_seeds)
            parts.append(f"{arm} {CHANGE.over_seeds(change)}")
        within = f" within {base.memory_budget}" if base.memory_budget else ""
        self._say(f"decoded{within} with a cache of {demands_text(base.demands)} what a token uses: {'; '.join(parts)}")

    def _routing(self, run: Run) -> str:
        base = self._base
        assert base is not None, "the base is measured first"
        if run.routing is None or base.routing is None:
            return "its routing was not measured"
        parts = [f"a token reuses {RATE.text(run.routing.reuse_rate_mean)} of the experts of the one before (EOR)"]
        if run is not base:
            change = relative_change(run.routing.reuse_rate_mean, base.routing.reuse_rate_mean)
            parts = [f"EOR {CHANGE.text(change)}"]
        sizes = _misses(run)
        near = {min(sizes, key=lambda size: abs(size - factor * min(sizes))) for factor in FACTORS if sizes}
        for slots in sorted(near):
            misses = sizes[slots]
            text = PERCENT.text(misses) if run is base else CHANGE.text(relative_change(misses, _misses(base)[slots]))
            parts.append(f"LRU misses with {slots} slots a layer {text}")
        return "; ".join(parts)

    def _quality(self, run: Run) -> str:
        """The mean perplexity; where there is none, the tasks."""
        if run.difference is not None:
            if change := run.difference.perplexity.get(MEAN):
                return f"mean perplexity {FINE_CHANGE.text(change.relative)}"
            changes = run.difference.tasks.items()
            return (
                ", ".join(f"{name} {POINTS.text(found.difference)}" for name, found in changes)
                or "its quality is known"
            )
        quality = run.quality
        if quality is None or quality.mean_perplexity is not None:
            return f"mean perplexity {PLAIN.text(quality.mean_perplexity if quality else None)}"
        asked = {name: found for name, found in quality.tasks.items() if found.of_group is None}
        return ", ".join(f"{name} {RATE.text(found.value)}" for name, found in asked.items())


def say_the_end(results: Results, folder: Path) -> None:
    """The report's headline as a table, without its times, and where the report is."""
    headline = headline_table(results)
    shown = [place for place, title in enumerate(headline.header) if not title.startswith(("TPOT", "worst task"))]
    table = Table(*(headline.header[place] for place in shown), caption="second lines: changes against base")
    for row in headline.rows:
        table.add_row(*(row[place] for place in shown))
    Console().print(table)
    print(f"The report is {folder / 'report.html'} (text: {folder / 'report.md'}, numbers: {folder / 'results.json'})")


def _misses(run: Run) -> dict[int, float]:
    """Slots of a layer -> LRU misses per access."""
    rows = [row for row in run.replay or [] if row.policy == "lru" and row.accesses]
    return {int(row.slots or 0): (row.misses or 0) / (row.accesses or 1) for row in rows}
