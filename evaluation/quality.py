"""Quality through lm-evaluation-harness: local tasks and perplexity per domain, and paired differences of two models.

Offline; tasks are the YAML files of a folder. What the harness reports is kept, plus one number per item, because only
pairing items shows a small difference honestly. Perplexities are per token and, as the harness has it, per word.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from configs.load import UserError
from evaluation import results

CHOSEN = ("acc", "exact_match")
"""How metrics begin that a choice by chance has a level of."""
PERPLEXITY = "perplexity_"  # prefix of the tasks that measure a domain's perplexity
RESAMPLES = 2000
CONFIDENCE = 0.95
Array = npt.NDArray[np.floating]


@dataclass
class QualityArguments:
    """What is asked of the model."""

    include_path: str = "data/embedded/tasks"  # folder of lm-evaluation-harness task YAMLs
    tasks: list[str] = field(
        default_factory=lambda: ["arithmetic", "letters", "headword", "next_line_prose", "next_line_code",
                                 "perplexity_prose", "perplexity_code", "perplexity_glosses", "perplexity_puzzles"]
    )  # fmt: skip
    limit: int | None = None  # items per task; null for all
    batch_size: int = 32


@dataclass(frozen=True)
class TaskScores:
    """One task: the metric of each item in the order of the task's file, and what an item chosen by chance has.

    Attributes:
        value: what the harness makes of them, if that is not their mean: then items cannot be paired.
        chance: None where the metric has no such level, or its task no choices.
    """

    metric: str
    values: Array
    chance: float | None = None
    value: float | None = None
    higher_is_better: bool = True

    @property
    def total(self) -> float:
        return float(self.values.mean()) if self.value is None else self.value

    @property
    def is_rate(self) -> bool:
        """Whether it is a share that is better the larger it is."""
        return self.higher_is_better and 0 <= self.total <= 1


@dataclass(frozen=True)
class TextScores:
    """A perplexity task's items: the log-likelihood of each in nats, and the tokens and words it is spread over."""

    values: Array
    tokens: Array
    words: Array | None


Scores = dict[str, TaskScores | TextScores]
"""Task -> its items."""


def run_tasks(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: QualityArguments) -> Scores:
    """Score `model` on every task.

    Raises:
        UserError: a task that the folder does not hold or that cannot be loaded, or that the harness fails on.
    """
    manager, tasks = load_tasks(args)
    from lm_eval import simple_evaluate  # type: ignore[import-untyped, unused-ignore]
    from lm_eval.api import model as lm_model
    from lm_eval.api import task as lm_task
    from lm_eval.models import huggingface

    length = int(model.config.get_text_config().max_position_embeddings)
    for module in (lm_model, lm_task, huggingface):  # it draws a bar for every batch: they go when they are full
        module.tqdm = partial(tqdm, leave=False)
    lm = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=args.batch_size, max_length=length)
    how = {"limit": args.limit, "bootstrap_iters": 0, "log_samples": True, "task_manager": manager}
    try:
        output = simple_evaluate(lm, tasks=list(args.tasks), **how)
    except (KeyError, ValueError, TypeError, AttributeError, ImportError, IndexError, ZeroDivisionError) as error:
        raise UserError(
            f"lm-evaluation-harness fails on one of the tasks {', '.join(args.tasks)}: {type(error).__name__}: {error}"
        ) from error
    return {
        name: _scores(task, output["samples"][name], output["results"][name], tokenizer) for name, task in tasks.items()
    }


def load_tasks(args: QualityArguments) -> tuple[Any, dict[str, Any]]:
    """The harness's task manager, and its tasks by name; what a first item lacks is found before any model runs.

    Raises:
        UserError: a task that the folder does not hold, or whose YAML or data the harness cannot use.
    """
    os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"
    import datasets
    from lm_eval.tasks import TaskManager  # type: ignore[import-untyped, unused-ignore]

    datasets.disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns that the model is already loaded
    manager = TaskManager(include_path=args.include_path, include_defaults=False)
    if unknown := [task for task in args.tasks if task not in manager.all_tasks]:
        raise UserError(
            f"task {unknown[0]!r} is not in {args.include_path}; it has {', '.join(manager.all_tasks) or 'no task at all'}. The "
            "shipped tasks are in data/embedded/tasks; `python -m data.build_tasks --split validation --output DIR` makes them "
            "of another split"
        )
    tasks: dict[str, Any] = {}
    for name in args.tasks:
        try:
            loaded = manager.load([name])["tasks"]
            for task in loaded.values():
                _look_at_first_item(task)
        except Exception as error:  # whatever a YAML, its functions and its data set may raise
            raise UserError(f"task {name!r} cannot be used: {type(error).__name__}: {error}") from error
        tasks |= loaded
    return manager, tasks


def _look_at_first_item(task: Any) -> None:
    """Ask for everything that the harness asks of an item; raises what it would, and where no choice is the right one."""
    item = next(iter(task.eval_docs))
    text, target = task.doc_to_text(item), task.doc_to_target(item)
    if task.OUTPUT_TYPE == "multiple_choice":
        choices, right = task.doc_to_choice(item), text if task.multiple_input else target
        for answer in right if isinstance(right, list) else [right]:
            if answer not in choices and answer not in range(len(choices)):
                raise ValueError(f"the right answer of its first item is {answer!r}, which is none of {choices}")


def _scores(
    task: Any, samples: list[dict[str, Any]], harness: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> TaskScores | TextScores:
    """One task's items, by its first metric and first filter."""
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    samples = [sample for sample in samples if sample["filter"] == filters[0]]
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return _text_scores(samples, tokenizer)
    named = [str(metric["metric"]) for metric in task.config.metric_list or []]
    metric = next(name for name in [*named, *samples[0]["metrics"]] if name in samples[0]["metrics"])
    higher = bool(task.higher_is_better().get(metric, True))
    value = harness.get(f"{metric},{filters[0]}")
    label = metric if len(filters) == 1 else f"{metric},{filters[0]}"
    numbers = [sample[metric] for sample in samples]
    if not all(isinstance(number, int | float | np.number) for number in numbers):
        if (total := _number(value)) is None:
            raise UserError(f"task {task.task_name!r}: its metric {label} gives {value!r}, which is no number")
        return TaskScores(label, np.zeros(len(numbers)), None, total, higher)
    values = np.array(numbers, dtype=float)
    is_mean = value is None or abs(float(value) - values.mean()) < 1e-9
    chance = 0.0 if is_mean else None
    if is_mean and task.OUTPUT_TYPE == "multiple_choice":
        level = float(np.mean([1 / len(task.doc_to_choice(sample["doc"])) for sample in samples]))
        chance = level if metric.startswith(CHOSEN) else None
    return TaskScores(label, values, chance, None if is_mean else _number(value), higher)


def _text_scores(samples: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> TextScores:
    """Texts of a rolling task: each metric holds the log-likelihood and what it is to be divided by."""
    of_metric = {name: np.array([sample[name] for sample in samples], dtype=float).T for name in samples[0]["metrics"]}
    log_likelihood = next(iter(of_metric.values()))[0]
    words = of_metric["word_perplexity"][1] if "word_perplexity" in of_metric else None
    texts = [sample["target"] for sample in samples]
    tokens = np.array([len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]], dtype=float)
    return TextScores(log_likelihood, tokens, words)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float | np.number) and np.isfinite(value) else None


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
            stderr = float(stats.sem(values)) if n > 1 and items.value is None else None
            about: dict[str, Any] = {
                key: getattr(items, key) for key in ("metric", "chance", "is_rate", "higher_is_better")
            }
            tasks[name] = results.TaskValue(value=items.total, stderr=stderr, n=n, **about)
    mean = float(np.exp(np.mean(logs))) if logs else None
    return results.Quality(tasks=tasks, perplexity=perplexity, mean_perplexity=mean)


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
    """Paired where the task's value is the mean of its items; else the difference of the values, without an interval."""
    if before.value is None and after.value is None:
        return _paired(before.values, after.values)
    return results.TaskDifference(difference=after.total - before.total, low=None, high=None)


def _paired(before: Array, after: Array) -> results.TaskDifference:
    """Mean difference and its t interval; a single item has no interval."""
    change, mean = after - before, float((after - before).mean())
    if len(change) < 2:
        return results.TaskDifference(difference=mean, low=None, high=None)
    half = float(stats.sem(change) * stats.t.ppf((1 + CONFIDENCE) / 2, len(change) - 1))
    return results.TaskDifference(difference=mean, low=mean - half, high=mean + half)


def _log_ratio(before: TextScores, after: TaskScores | TextScores, draw: np.random.Generator) -> tuple[float, Array]:
    """log(perplexity after / before) per token, and its bootstrap over items."""
    loss, tokens = before.values - after.values, before.tokens
    picks = draw.integers(0, len(loss), size=(RESAMPLES, len(loss)))
    return float(loss.sum() / tokens.sum()), loss[picks].sum(1) / tokens[picks].sum(1)


def _relative(point: float, samples: Array) -> results.PerplexityDifference:
    low, high = np.quantile(samples, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    relative, low, high = (float(np.expm1(log)) for log in (point, low, high))
    return results.PerplexityDifference(relative=relative, low=low, high=high)
