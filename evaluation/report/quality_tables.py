"""The report's tables on quality: absolute values, and differences from base with their intervals."""

from typing import Any

from evaluation.report.summary import (
    MEAN,
    change,
    frontier,
    frontier_budgets,
    measure,
    names,
    pick,
    runs_of,
    tuned_arms,
)
from evaluation.report.tables import Table
from evaluation.report.wording import COUNT, FINE_CHANGE, MISSING, PLAIN, POINTS, RATE, Unit, bytes_text, data_size
from evaluation.results import Results


def values_table(results: Results) -> Table:
    """Absolute quality, one column per arm."""
    arms = list(results["arms"])
    rows = []
    for task in names(results, "tasks"):
        about = _about(results, "tasks", task)
        cells = [_task_value(results, arm, task) for arm in arms]
        chance = MISSING if about is None else RATE.text(about["chance"])
        items = MISSING if about is None else COUNT.text(about["n"])
        rows.append([task, str((about and about["metric"]) or MISSING), items, chance, *cells])
    rows += _perplexity_rows(results, "perplexity", "perplexity per token")
    means = [measure(results, arm, "quality", "mean_perplexity") for arm in arms]
    if any(means):
        rows.append(["mean over domains", "perplexity per token", MISSING, MISSING, *map(PLAIN.spread, means)])
    rows += _perplexity_rows(results, "word_perplexity", "perplexity per word")
    note = (
        "In parentheses the standard error over the items of a task. Higher is better for tasks, lower for perplexity."
    )
    return Table("Absolute values", ["task or domain", "metric", "items", "chance", *arms], rows, note, text_columns=2)


def _perplexity_rows(results: Results, key: str, metric: str) -> list[list[str]]:
    rows = []
    for domain in names(results, "perplexity"):
        about = _about(results, "perplexity", domain)
        found = [measure(results, arm, "quality", "perplexity", domain, key) for arm in results["arms"]]
        if any(found):
            items = MISSING if about is None else COUNT.text(about["n"])
            rows.append([domain, metric, items, MISSING, *map(PLAIN.spread, found)])
    return rows


def _task_value(results: Results, arm: str, task: str) -> str:
    value = measure(results, arm, "quality", "tasks", task, "value")
    error = measure(results, arm, "quality", "tasks", task, "stderr")
    return RATE.spread(value) + ("" if error is None else f" ({RATE.text(error.mean)})")


def _about(results: Results, kind: str, name: str) -> dict[str, Any] | None:
    entries = (pick(run, "quality", kind, name) for arm in results["arms"] for run in runs_of(results, arm))
    return next((entry for entry in entries if entry is not None), None)


def differences_table(results: Results) -> Table:
    """Tuned minus base, one column per tuned arm."""
    arms = tuned_arms(results)
    rows = [
        ["task", name, *(_starred(results, arm, "tasks", name, POINTS) for arm in arms)]
        for name in names(results, "tasks")
    ]
    for name in [*names(results, "perplexity"), MEAN]:
        label = "mean over domains" if name == MEAN else name
        rows.append(["perplexity", label, *(_starred(results, arm, "perplexity", name, FINE_CHANGE) for arm in arms)])
    note = "pt: percentage points. A star marks an interval that excludes zero."
    return Table("Differences from base", ["kind", "name", *arms], rows if arms else [], note, text_columns=2)


def _starred(results: Results, arm: str, kind: str, name: str, unit: Unit) -> str:
    found = change(results, arm, kind, name)
    return unit.change(found) + (" *" if found is not None and found.excludes_zero else "")


def frontier_table(results: Results) -> Table:
    """What the frontier figure shows, one row per cache size and arm."""
    rows = [
        [data_size(size).text(size), arm, bytes_text(point.bytes_per_token), FINE_CHANGE.change(point.cost)]
        for size in frontier_budgets(results)
        for arm, point in frontier(results, size).items()
    ]
    return Table(
        "Price of reading less", ["expert cache", "arm", "bytes / token", "mean perplexity"], rows, text_columns=2
    )
