"""What lm-evaluation-harness finds of one model: a number for every item of every task, by every metric.

What the harness reports is kept, plus one number per item, because only pairing items shows a small difference honestly.
Perplexities are per token and, as the harness has it, per word.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from configs.files import write_text
from configs.load import UserError
from evaluation.engine.engine import Engine
from evaluation.quality.batches import Answers, process_index
from evaluation.quality.tasks import LoadedTasks, QualityArguments, load_tasks

CHOSEN = ("acc", "exact_match")
"""How metrics begin that a choice by chance has a level of."""
RESIDENT_BATCH = 32
Array = npt.NDArray[np.floating]


@dataclass(frozen=True)
class TaskScores:
    """One task by one metric, its items in the order of the task's file; or a group, its tasks' items one task after the other.

    Attributes:
        metric: its name, with the filter's where the task has several.
        values: one for each item; zeros where an item has no number of its own.
        chance: what an item chosen by chance has; None where the metric has no such level, or its task no choices.
        value: what the harness makes of them, if that is not their mean.
        items: what `aggregate` makes `value` of, if it is not the mean of numbers.
        sizes: items of each task of a group; one entry for a task.
        weights: of each task in its group; they add up to 1.
        of_group: the group that was asked, if this is one of its tasks.
    """

    metric: str
    values: Array
    chance: float | None = None
    value: float | None = None
    higher_is_better: bool = True
    items: Sequence[Any] = ()
    aggregate: Callable[[Sequence[Any]], float] | None = None
    sizes: tuple[int, ...] = ()
    weights: tuple[float, ...] = (1.0,)
    of_group: str | None = None

    @property
    def total(self) -> float:
        if self.value is not None:
            return self.value
        return float(self.values.mean()) if len(self.weights) == 1 else self.weighted(lambda part: float(part.mean()))

    @property
    def is_rate(self) -> bool:
        """Whether it is a share that is better the larger it is."""
        return self.higher_is_better and 0 <= self.total <= 1

    def weighted(self, of_task: Callable[[Array], float]) -> float:
        """A number of each task of a group, added up by weight."""
        return sum(weight * of_task(part) for weight, part in zip(self.weights, self.parts(self.values), strict=True))

    def parts(self, values: Array) -> list[Array]:
        """`values` of the items of each task."""
        return np.split(values, np.cumsum(self.sizes)[:-1]) if self.sizes else [values]


@dataclass(frozen=True)
class TextScores:
    """A perplexity task's items: the log-likelihood of each in nats, and the tokens and words it is spread over."""

    values: Array
    tokens: Array
    words: Array | None


Scores = dict[str, TaskScores | TextScores]
"""Task -> its items; further metrics of the same task as `task (metric)`."""


def run_tasks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: QualityArguments, *,
    tasks: LoadedTasks | None = None, engine: Engine | None = None, answers: Answers | None = None,
    samples: Path | None = None,
) -> Scores:  # fmt: skip
    """Score `model` on every task.

    Args:
        tasks: loaded before; left out: they are loaded here.
        engine: pages the experts of `model`; None if all of them are in memory.
        answers: where they are kept; None: nowhere.
        samples: folder for every item as the harness saw it, if `args` asks for that.

    Returns:
        None of them in a process that is not the first of its machine: it only answers a share of the requests.

    Raises:
        UserError: a task that cannot be loaded, or that the harness fails on; a metric that its task does not have.
    """
    from evaluation.quality.language_model import BatchedLM

    most = args.batch_size or (None if engine else RESIDENT_BATCH)
    lm = BatchedLM(model, tokenizer, engine=engine, batch_size=most, answers=answers)
    return scores_of(lm, tokenizer, args, tasks or load_tasks(args), samples=samples if args.log_samples else None)


def scores_of(
    lm: Any, tokenizer: PreTrainedTokenizerBase, args: QualityArguments, tasks: LoadedTasks, *,
    samples: Path | None = None,
) -> Scores:  # fmt: skip
    """What any model of the harness scores; see `run_tasks`."""
    from lm_eval import evaluator, simple_evaluate  # type: ignore[import-untyped, unused-ignore]
    from lm_eval.api import model as lm_model
    from lm_eval.api import task as lm_task

    evaluator.get_git_commit_hash = lambda: (
        None
    )  # of the folder that one happens to be in; it complains where that is no clone
    for module in (lm_model, lm_task):  # it draws a bar for every task: they go when they are full
        module.tqdm = partial(tqdm, leave=False, disable=process_index() > 0)
    how = {
        "limit": args.limit, "num_fewshot": args.num_fewshot, "apply_chat_template": args.apply_chat_template,
        "fewshot_as_multiturn": args.fewshot_as_multiturn and args.apply_chat_template,
        "system_instruction": args.system_instruction, "gen_kwargs": dict(args.gen_kwargs) or None,
        "fewshot_random_seed": args.seed, "confirm_run_unsafe_code": args.confirm_run_unsafe_code,
        "bootstrap_iters": 0, "log_samples": True, "task_manager": tasks.manager,
    }  # fmt: skip
    try:
        output = simple_evaluate(lm, tasks=list(tasks.chosen), **how)
    except (KeyError, ValueError, TypeError, AttributeError, ImportError, IndexError, ZeroDivisionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"lm-evaluation-harness fails on one of the tasks {', '.join(tasks.tasks)}: {type(error).__name__}: {error}"
        ) from error
    scores: Scores = {}
    if output is None:  # the harness gives results to the first process of a machine only
        return scores
    for name, task in tasks.tasks.items():
        if samples is not None:
            _write_samples(samples / f"{name.replace('/', '_')}.jsonl", output["samples"][name])
        found = _scores(task, output["samples"][name], output["results"][name], tokenizer, args.metrics.get(name))
        group = tasks.group_of.get(name)
        scores |= {
            key: replace(one, of_group=group) if isinstance(one, TaskScores) else one for key, one in found.items()
        }
    for name, group in tasks.groups.items():
        for key, one in _of_group(name, group, scores).items():
            scores[key] = replace(one, of_group=tasks.group_of.get(name))
    return scores


def _write_samples(path: Path, samples: Sequence[Mapping[str, Any]]) -> None:
    """Every item in the harness's own words, a line each: what was asked, answered and expected, and what it was worth."""
    from lm_eval.utils import handle_non_serializable  # type: ignore[import-untyped, unused-ignore]

    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(sample, ensure_ascii=False, default=handle_non_serializable) for sample in samples]
    write_text(path, "".join(f"{line}\n" for line in lines))


def _scores(
    task: Any, samples: list[dict[str, Any]], harness: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase,
    wanted: list[str] | None,
) -> Scores:  # fmt: skip
    """One task's items by every metric and filter, or by those that are wanted."""
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return {task.task_name: _text_scores(samples, tokenizer)}
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    found = {}
    for metric, filtered in _in_the_order_of_the_task(task, samples, filters):
        label = metric if len(filters) == 1 else f"{metric},{filtered}"
        of_filter = [sample for sample in samples if sample["filter"] == filtered]
        if wanted is None or {metric, f"{metric},{filtered}"} & set(wanted):
            found[label] = _task_scores(task, of_filter, metric, label, harness.get(f"{metric},{filtered}"))
    known = [f"{metric},{filtered}" for metric, filtered in _in_the_order_of_the_task(task, samples, filters)]
    if missing := [name for name in wanted or [] if not any(name in (key, key.split(",")[0]) for key in known)]:
        raise UserError(f"task {task.task_name!r} has no metric {missing[0]!r}; it has {', '.join(known)}")
    first = next(iter(found), None)
    return {task.task_name if label == first else f"{task.task_name} ({label})": of for label, of in found.items()}


def _in_the_order_of_the_task(
    task: Any, samples: list[dict[str, Any]], filters: list[str]
) -> Iterator[tuple[str, str]]:
    """(metric, filter) as the task's YAML names them, then others."""
    named = [str(metric["metric"]) for metric in task.config.metric_list or []]
    for filtered in filters:
        has = next(sample["metrics"] for sample in samples if sample["filter"] == filtered)
        yield from ((metric, filtered) for metric in dict.fromkeys([*named, *has]) if metric in has)


def _task_scores(task: Any, samples: list[dict[str, Any]], metric: str, label: str, value: Any) -> TaskScores:
    higher = bool(task.higher_is_better().get(metric, True))
    items = [sample[metric] for sample in samples]
    about: dict[str, Any] = {"higher_is_better": higher, "sizes": (len(items),)}
    with_aggregate = about | {"items": items, "aggregate": task.aggregation().get(metric)}
    if not all(isinstance(number, int | float | np.number) for number in items):
        if (total := _number(value)) is None:
            raise UserError(f"task {task.task_name!r}: its metric {label} gives {value!r}, which is no number")
        return TaskScores(label, np.zeros(len(items)), None, total, **with_aggregate)
    values = np.array(items, dtype=float)
    if value is not None and abs(float(value) - values.mean()) >= 1e-9:
        return TaskScores(label, values, None, _number(value), **with_aggregate)
    chance: float | None = 0.0
    if task.OUTPUT_TYPE == "multiple_choice":
        level = float(np.mean([1 / len(task.doc_to_choice(sample["doc"])) for sample in samples]))
        chance = level if metric.startswith(CHOSEN) else None
    return TaskScores(label, values, chance, **about)


def _of_group(name: str, group: Any, scores: Scores) -> dict[str, TaskScores]:
    """The metrics that a group adds up over its tasks, with the harness's weights."""
    found: dict[str, TaskScores] = {}
    for how in group.aggregate_metric_list or []:
        of_tasks: dict[str, list[TaskScores]] = {}
        for task in group.get_all_tasks():
            own = [task.task_name, *(key for key in scores if key.startswith(f"{task.task_name} ("))]
            for key in own:
                one = scores.get(key)
                if isinstance(one, TaskScores) and one.value is None and one.metric.split(",")[0] == how.metric:
                    of_tasks.setdefault(one.metric, []).append(one)
        for metric, parts in of_tasks.items():
            sizes = tuple(len(part.values) for part in parts)
            shares = np.array(sizes if how.weight_by_size else [1] * len(parts), dtype=float)
            chances = [part.chance for part in parts]
            weights = tuple((shares / shares.sum()).tolist())
            chance = None if None in chances else float(np.dot(weights, [c or 0.0 for c in chances]))
            about: dict[str, Any] = {"higher_is_better": parts[0].higher_is_better, "sizes": sizes, "weights": weights}
            key = name if not found else f"{name} ({metric})"
            found[key] = TaskScores(metric, np.concatenate([part.values for part in parts]), chance, **about)
    return found


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
