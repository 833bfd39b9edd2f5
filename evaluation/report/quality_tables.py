"""The report's tables on quality: absolute values, and differences from base with their intervals."""

from collections.abc import Callable

from evaluation.report import summary
from evaluation.report.numbers import COUNT, FINE_CHANGE, MISSING, PLAIN, PLAIN_CHANGE, POINTS, RATE, Unit, bytes_text
from evaluation.report.summary import Change, Number, seed_mean
from evaluation.report.tables import Table
from evaluation.results import MEAN, DomainPerplexity, Results

STAR = " *"
MEAN_LABEL = "mean over domains"


def values_table(results: Results) -> Table:
    """Absolute quality, one column per arm."""
    arms = list(results.arms)
    rows = [_task_row(results, task) for task in summary.task_names(results)]
    rows += _perplexity_rows(results, "perplexity per token", lambda domain: domain.perplexity)
    means = [summary.mean_perplexity(results, arm) for arm in arms]
    if any(means):
        rows.append([MEAN_LABEL, "perplexity per token", MISSING, MISSING, *map(PLAIN.over_seeds, means)])
    rows += _perplexity_rows(results, "perplexity per word", lambda domain: domain.word_perplexity)
    note = (
        "In parentheses the standard error over the items of a task. Higher is better for tasks, lower for perplexity."
    )
    return Table("Absolute values", ["task or domain", "metric", "items", "chance", *arms], rows, note, text_columns=2)


def inner_table(results: Results) -> Table:
    """The tasks of groups, which are not among what was asked."""
    asked = summary.task_names(results)
    inner = [task for task in summary.task_names(results, within_groups=True) if task not in asked]
    header = ["task", "metric", "items", "chance", *results.arms]
    return Table("Tasks of groups", header, [_task_row(results, task) for task in inner], text_columns=2)


def _task_row(results: Results, task: str) -> list[str]:
    by_arm = [[q.tasks[task] for q in summary.qualities(results, arm) if task in q.tasks] for arm in results.arms]
    about = next((found for of_arm in by_arm for found in of_arm), None)
    row = [task, MISSING, MISSING, MISSING]
    if about:
        metric = about.metric or MISSING
        named = metric if about.higher_is_better else f"{metric} (lower is better)"
        row = [task, named, COUNT.text(about.n), RATE.text(about.chance)]
    unit = RATE if about is None or about.is_rate else PLAIN
    for of_arm in by_arm:
        error = seed_mean(found.stderr for found in of_arm)
        beside = f" ({unit.text(error.mean)})" if error else ""
        row.append(unit.over_seeds(seed_mean(found.value for found in of_arm)) + beside)
    return row


def _perplexity_rows(results: Results, metric: str, value_of: Callable[[DomainPerplexity], Number]) -> list[list[str]]:
    rows = []
    for domain in summary.domain_names(results):
        by_arm = [[q.perplexity.get(domain) for q in summary.qualities(results, arm)] for arm in results.arms]
        items = next((found.n for of_arm in by_arm for found in of_arm if found), None)
        means = [seed_mean(value_of(found) for found in of_arm if found) for of_arm in by_arm]
        if any(means):
            rows.append([domain, metric, COUNT.text(items), MISSING, *map(PLAIN.over_seeds, means)])
    return rows


def differences_table(results: Results) -> Table:
    """Tuned minus base, one column per tuned arm."""
    arms = summary.tuned_arms(results)
    rows = []
    found = {arm: summary.task_changes(results, arm) for arm in arms}
    certain = {arm: summary.certain(changes) for arm, changes in found.items()}
    for task in summary.task_names(results):
        row = ["task", task]
        for arm in arms:
            if change := found[arm].get(task):
                row.append(POINTS.change(change) + STAR * (task in certain[arm]))
            else:
                row.append(_starred(summary.task_change(results, arm, task, shares=False), PLAIN_CHANGE))
        rows.append(row)
    for domain in [*summary.domain_names(results), MEAN]:
        of_arms = [summary.perplexity_change(results, arm, domain) for arm in arms]
        name = MEAN_LABEL if domain == MEAN else domain
        rows.append(["perplexity", name, *(_starred(change, FINE_CHANGE) for change in of_arms)])
    note = (
        "pt: percentage points; other metrics in their own unit. A star marks a difference of a share that is more than "
        "chance although so many tasks were looked at (Holm's correction), and any other interval that excludes zero."
    )
    return Table("Differences from base", ["kind", "name", *arms], rows if arms else [], note, text_columns=2)


def _starred(found: Change | None, unit: Unit) -> str:
    return unit.change(found) + STAR * (found is not None and found.excludes_zero)


def frontier_table(results: Results) -> Table:
    """What the frontier figure shows, one row per cache size and arm."""
    header = ["expert cache", "arm", "bytes / token", "mean perplexity"]
    rows = [
        [bytes_text(size), arm, bytes_text(point.bytes_per_token), FINE_CHANGE.change(point.cost)]
        for size in summary.frontier_budgets(results)
        for arm, point in summary.frontier(results, size).items()
    ]
    return Table("Price of reading less", header, rows, text_columns=2)
