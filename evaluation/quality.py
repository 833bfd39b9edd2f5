"""Quality through lm-evaluation-harness: local tasks and perplexity per domain, and paired differences of two models.

Offline; tasks are the YAML files of a folder. What the harness reports is kept, plus one number per item, because only
pairing items shows a small difference honestly. Perplexities are per token and, as the harness has it, per word.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from configs.load import UserError
from evaluation.results import (
    MEAN,
    Difference,
    DomainPerplexity,
    PerplexityDifference,
    Quality,
    TaskDifference,
    TaskValue,
)

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
    """One task's items in the order of the task's file.

    `values`: the metric of each item. For a perplexity task the metric is the item's log-likelihood in nats, and
    `tokens` and `words` are what it is spread over.
    """

    name: str
    metric: str
    values: Array
    chance: float
    tokens: Array | None = None
    words: Array | None = None

    @property
    def measures_perplexity(self) -> bool:
        return self.tokens is not None


def run_tasks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: QualityArguments
) -> dict[str, TaskScores]:
    """Score `model` on every task.

    Raises:
        UserError: a task that the folder does not hold.
    """
    os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"
    import datasets
    from lm_eval import simple_evaluate  # type: ignore[import-untyped, unused-ignore]
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    known = sorted(path.stem for path in Path(args.include_path).glob("*.yaml"))
    if unknown := [task for task in args.tasks if task not in known]:
        raise UserError(
            f"task {unknown[0]!r} is not in {args.include_path}; it has {', '.join(known) or 'no task at all'}. The shipped "
            "tasks are in data/embedded/tasks; `python -m data.build_tasks --split validation --output DIR` makes them of "
            "another split"
        )
    datasets.disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns that the model is already loaded
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=args.batch_size, max_length=_context(model))
    output = simple_evaluate(
        lm, tasks=list(args.tasks), limit=args.limit, bootstrap_iters=0, log_samples=True,
        task_manager=TaskManager(include_path=args.include_path, include_defaults=False),
    )  # fmt: skip
    return {
        task: _scores(
            task, output["configs"][task], sorted(output["samples"][task], key=lambda s: s["doc_id"]), tokenizer
        )
        for task in args.tasks
    }


def _scores(
    task: str, config: Mapping[str, Any], samples: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> TaskScores:
    metric = str(config["metric_list"][0]["metric"])
    if config["output_type"] == "loglikelihood_rolling":
        texts = [sample["target"] for sample in samples]
        log_likelihood, words = np.array([sample[metric] for sample in samples], dtype=float).T
        tokens = np.array([len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]], dtype=float)
        return TaskScores(task, metric, log_likelihood, chance=0.0, tokens=tokens, words=words)
    values = np.array([float(sample[metric]) for sample in samples])
    choices = (
        [len(sample["doc"]["choices"]) for sample in samples] if config["output_type"] == "multiple_choice" else []
    )
    return TaskScores(task, metric, values, chance=float(np.mean(1 / np.array(choices))) if choices else 0.0)


def summarize(scores: Mapping[str, TaskScores]) -> Quality:
    """The value of every task with its standard error, every domain's perplexity, and their geometric mean."""
    tasks, perplexity, logs = {}, {}, []
    for name, task in scores.items():
        n = len(task.values)
        if task.measures_perplexity:
            per_token = float(np.exp(-task.values.sum() / _tokens(task).sum()))
            logs.append(np.log(per_token))
            perplexity[name.removeprefix(PERPLEXITY)] = DomainPerplexity(
                perplexity=per_token,
                word_perplexity=float(np.exp(-task.values.sum() / _words(task).sum())),
                n=n,
            )
        else:
            stderr = float(stats.sem(task.values)) if n > 1 else None
            value = float(task.values.mean())
            tasks[name] = TaskValue(metric=task.metric, value=value, stderr=stderr, n=n, chance=task.chance)
    return Quality(tasks=tasks, perplexity=perplexity, mean_perplexity=float(np.exp(np.mean(logs))) if logs else None)


def differences(base: Mapping[str, TaskScores], tuned: Mapping[str, TaskScores]) -> Difference:
    """Tuned minus base with paired 95 % intervals: tasks in their metric, perplexity per token as a relative change."""
    draw = np.random.default_rng(0)
    tasks, perplexity, resampled, points = {}, {}, [], []
    for name, before in base.items():
        if before.measures_perplexity:
            point, samples = _log_ratio(before, tuned[name], draw)
            perplexity[name.removeprefix(PERPLEXITY)] = _relative(point, samples)
            points.append(point)
            resampled.append(samples)
        else:
            tasks[name] = _paired(before.values, tuned[name].values)
    if points:
        perplexity[MEAN] = _relative(float(np.mean(points)), np.mean(resampled, axis=0))
    return Difference(tasks=tasks, perplexity=perplexity)


def _paired(before: Array, after: Array) -> TaskDifference:
    """Mean difference and its t interval; a single item has no interval."""
    change, mean = after - before, float((after - before).mean())
    if len(change) < 2:
        return TaskDifference(difference=mean, low=None, high=None)
    half = float(stats.sem(change) * stats.t.ppf((1 + CONFIDENCE) / 2, len(change) - 1))
    return TaskDifference(difference=mean, low=mean - half, high=mean + half)


def _log_ratio(before: TaskScores, after: TaskScores, draw: np.random.Generator) -> tuple[float, Array]:
    """log(perplexity after / before) per token, and its bootstrap over items."""
    loss, tokens = before.values - after.values, _tokens(before)
    picks = draw.integers(0, len(loss), size=(RESAMPLES, len(loss)))
    return float(loss.sum() / tokens.sum()), loss[picks].sum(1) / tokens[picks].sum(1)


def _relative(point: float, samples: Array) -> PerplexityDifference:
    low, high = np.quantile(samples, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return PerplexityDifference(relative=float(np.expm1(point)), low=float(np.expm1(low)), high=float(np.expm1(high)))


def _tokens(task: TaskScores) -> Array:
    assert task.tokens is not None, f"{task.name} does not measure perplexity"
    return task.tokens


def _words(task: TaskScores) -> Array:
    assert task.words is not None, f"{task.name} does not measure perplexity"
    return task.words


def _context(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().max_position_embeddings)
