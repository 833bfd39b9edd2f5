"""What scores come to, and what two models' scores differ by: paired, because only that shows a small difference honestly."""

from typing import Any

import numpy as np
from scipy import stats

from evaluation import results
from evaluation.quality.scores import Array, Scores, TaskScores, TextScores

PERPLEXITY = "perplexity_"  # prefix of the tasks that measure a domain's perplexity
RESAMPLES = 2000
RESAMPLES_OF_AGGREGATES = 500  # of metrics that are not means: each draw is computed anew
CONFIDENCE = 0.95
NORMAL = float(stats.norm.ppf((1 + CONFIDENCE) / 2))


def summarize(scores: Scores) -> results.Quality:
    """The value of every task with its standard error, every domain's perplexity, and their geometric mean."""
    tasks, perplexity, logs = {}, {}, []
    for name, items in scores.items():
        values, n = items.values, len(items.values)
        if isinstance(items, TextScores):
            per_token = float(np.exp(-values.sum() / items.tokens.sum()))
            per_word = None if items.words is None else float(np.exp(-values.sum() / items.words.sum()))
            logs.append(np.log(per_token))
            found = results.DomainPerplexity(perplexity=per_token, word_perplexity=per_word, n=n)
            perplexity[name.removeprefix(PERPLEXITY)] = found
        else:
            about: dict[str, Any] = {
                key: getattr(items, key) for key in ("metric", "chance", "is_rate", "higher_is_better", "of_group")
            }
            tasks[name] = results.TaskValue(value=items.total, stderr=_standard_error(items), n=n, **about)
    mean = float(np.exp(np.mean(logs))) if logs else None
    return results.Quality(tasks=tasks, perplexity=perplexity, mean_perplexity=mean)


def _standard_error(items: TaskScores) -> float | None:
    """Of a mean over items; None for a single item, and for what is no mean."""
    parts = items.parts(items.values)
    if items.value is not None or min(map(len, parts)) < 2:
        return None
    errors = [weight * stats.sem(part) for weight, part in zip(items.weights, parts, strict=True)]
    return float(errors[0]) if len(errors) == 1 else float(np.linalg.norm(errors))


def differences(base: Scores, tuned: Scores) -> results.Difference:
    """Tuned minus base with paired 95 % intervals: tasks in their metric, perplexity per token as a relative change."""
    draw = np.random.default_rng(0)
    tasks: dict[str, results.TaskDifference] = {}
    other: dict[str, results.TaskDifference] = {}
    perplexity, ratios = {}, []
    for name, before in base.items():
        after = tuned[name]
        if isinstance(before, TextScores):
            ratios.append(_log_ratio(before, after, draw))
            perplexity[name.removeprefix(PERPLEXITY)] = _relative(*ratios[-1])
            continue
        assert isinstance(after, TaskScores), "the same task"
        (tasks if before.is_rate and after.is_rate else other)[name] = _difference(before, after)
    if ratios:
        points, resampled = zip(*ratios, strict=True)
        perplexity[results.MEAN] = _relative(float(np.mean(points)), np.mean(resampled, axis=0))
    return results.Difference(tasks=tasks, other=other, perplexity=perplexity)


def _difference(before: TaskScores, after: TaskScores) -> results.TaskDifference:
    """Paired over items: of shares of right answers, of means, or of what the harness makes of all items."""
    if before.value is not None or after.value is not None:
        return _of_aggregates(before, after)
    point, changes = after.total - before.total, before.parts(after.values - before.values)
    if len(changes) == 1:
        point = float(changes[0].mean())
    if min(map(len, changes)) < 2:
        return results.TaskDifference(difference=point, low=None, high=None)
    are_answers = np.isin(np.concatenate([before.values, after.values]), (0, 1)).all()
    return (_of_answers if are_answers else _of_means)(point, changes, before.weights)


def _of_answers(point: float, changes: list[Array], weights: tuple[float, ...]) -> results.TaskDifference:
    """Right or wrong: the interval of Bonett and Price (2012), which has a width even where no answer changed, as a small
    number of items leaves room for a change; p is McNemar's exact test, for a group that of its interval."""
    middle, variance = 0.0, 0.0
    for weight, change in zip(weights, changes, strict=True):
        gained, lost, n = int((change > 0).sum()), int((change < 0).sum()), len(change)
        up, down = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
        middle += weight * (up - down)
        variance += weight**2 * (up + down - (up - down) ** 2) / (n + 2)
    half = NORMAL * float(np.sqrt(variance))
    if len(changes) == 1:
        p = float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    else:
        p = float(2 * stats.norm.sf(abs(middle) / np.sqrt(variance)))
    return results.TaskDifference(difference=point, low=min(middle - half, point), high=max(middle + half, point), p=p)


def _of_means(point: float, changes: list[Array], weights: tuple[float, ...]) -> results.TaskDifference:
    """The t interval, and the paired t test's p."""
    errors = [weight * stats.sem(change) for weight, change in zip(weights, changes, strict=True)]
    error = float(errors[0]) if len(errors) == 1 else float(np.linalg.norm(errors))
    freedom = sum(len(change) - 1 for change in changes)
    half = error * float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom))
    p = float(2 * stats.t.sf(abs(point) / error, freedom)) if error else (1.0 if point == 0 else 0.0)
    return results.TaskDifference(difference=point, low=point - half, high=point + half, p=p)


def _of_aggregates(before: TaskScores, after: TaskScores) -> results.TaskDifference:
    """A paired bootstrap over items, as far as the harness says how a value is made of them; no p."""
    point, aggregate, n = after.total - before.total, before.aggregate, len(before.items)
    if aggregate is None or n < 2:
        return results.TaskDifference(difference=point, low=None, high=None)
    draw, drawn = np.random.default_rng(0), []
    for _ in range(RESAMPLES_OF_AGGREGATES):
        picks = draw.integers(0, n, size=n)
        drawn.append(aggregate([after.items[i] for i in picks]) - aggregate([before.items[i] for i in picks]))
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return results.TaskDifference(difference=point, low=float(low), high=float(high))


def _log_ratio(before: TextScores, after: TaskScores | TextScores, draw: np.random.Generator) -> tuple[float, Array]:
    """log(perplexity after / before) per token, and its bootstrap over items."""
    loss, tokens = before.values - after.values, before.tokens
    picks = draw.integers(0, len(loss), size=(RESAMPLES, len(loss)))
    return float(loss.sum() / tokens.sum()), loss[picks].sum(1) / tokens[picks].sum(1)


def _relative(point: float, samples: Array) -> results.PerplexityDifference:
    low, high = np.quantile(samples, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    relative, low, high = (float(np.expm1(log)) for log in (point, low, high))
    return results.PerplexityDifference(relative=relative, low=low, high=high)
