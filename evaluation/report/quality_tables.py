"""The report's tables on quality: absolute values, and differences from base with their intervals."""

from collections.abc import Callable

from evaluation.report import summary
from evaluation.report.numbers import COUNT, FINE_CHANGE, MISSING, PLAIN, POINTS, RATE, Unit, bytes_text, data_size
from evaluation.report.summary import Change, Number, SeedMean
from evaluation.report.tables import Table
from evaluation.results import MEAN, DomainPerplexity, Results, TaskValue

MEAN_LABEL = "mean over domains"


def values_table(results: Results) -> Table:
    """Absolute quality, one column per arm."""
    arms = list(results.arms)
    rows = [_task_row(results, task) for task in summary.task_names(results)]
    rows += _perplexity_rows(results, "perplexity per token", lambda domain: domain.perplexity)
    means = [summary.scored(results, arm, lambda quality: quality.mean_perplexity) for arm in arms]
    if any(means):
        rows.append([MEAN_LABEL, "perplexity per token", MISSING, MISSING, *map(PLAIN.over_seeds, means)])
    rows += _perplexity_rows(results, "perplexity per word", lambda domain: domain.word_perplexity)
    note = (
        "In parentheses the standard error over the items of a task. Higher is better for tasks, lower for perplexity."
    )
    return Table("Absolute values", ["task or domain", "metric", "items", "chance", *arms], rows, note, text_columns=2)


def _task_row(results: Results, task: str) -> list[str]:
    about = next(
        (run.quality.tasks[task] for run in summary.all_runs(results) if run.quality and task in run.quality.tasks),
        None,
    )
    cells = []
    for arm in results.arms:
        value = _task_mean(results, arm, task, lambda found: found.value)
        error = _task_mean(results, arm, task, lambda found: found.stderr)
        cells.append(RATE.over_seeds(value) + ("" if error is None else f" ({RATE.text(error.mean)})"))
    if about is None:
        return [task, MISSING, MISSING, MISSING, *cells]
    return [task, about.metric or MISSING, COUNT.text(about.n), RATE.text(about.chance), *cells]


def _task_mean(results: Results, arm: str, task: str, value_of: Callable[[TaskValue], Number]) -> SeedMean | None:
    return summary.scored(
        results, arm, lambda quality: value_of(quality.tasks[task]) if task in quality.tasks else None
    )


def _perplexity_rows(results: Results, metric: str, value_of: Callable[[DomainPerplexity], Number]) -> list[list[str]]:
    rows = []
    for domain in summary.domain_names(results):
        entries = [run.quality.perplexity.get(domain) for run in summary.all_runs(results) if run.quality]
        items = next((entry.n for entry in entries if entry is not None), None)
        found = [_domain_mean(results, arm, domain, value_of) for arm in results.arms]
        if any(found):
            rows.append([domain, metric, COUNT.text(items), MISSING, *map(PLAIN.over_seeds, found)])
    return rows


def _domain_mean(
    results: Results, arm: str, domain: str, value_of: Callable[[DomainPerplexity], Number]
) -> SeedMean | None:
    return summary.scored(
        results, arm, lambda quality: value_of(quality.perplexity[domain]) if domain in quality.perplexity else None
    )


def differences_table(results: Results) -> Table:
    """Tuned minus base, one column per tuned arm."""
    arms = summary.tuned_arms(results)
    rows = [
        ["task", task, *(_starred(summary.task_change(results, arm, task), POINTS) for arm in arms)]
        for task in summary.task_names(results)
    ] + [
        [
            "perplexity",
            MEAN_LABEL if domain == MEAN else domain,
            *(_starred(summary.perplexity_change(results, arm, domain), FINE_CHANGE) for arm in arms),
        ]
        for domain in [*summary.domain_names(results), MEAN]
    ]
    note = "pt: percentage points. A star marks an interval that excludes zero."
    return Table("Differences from base", ["kind", "name", *arms], rows if arms else [], note, text_columns=2)


def _starred(found: Change | None, unit: Unit) -> str:
    return unit.change(found) + (" *" if found is not None and found.excludes_zero else "")


def frontier_table(results: Results) -> Table:
    """What the frontier figure shows, one row per cache size and arm."""
    header = ["expert cache", "arm", "bytes / token", "mean perplexity"]
    rows = [
        [data_size(size).text(size), arm, bytes_text(point.bytes_per_token), FINE_CHANGE.change(point.cost)]
        for size in summary.frontier_budgets(results)
        for arm, point in summary.frontier(results, size).items()
    ]
    return Table("Price of reading less", header, rows, text_columns=2)
