"""Quality through lm-evaluation-harness: local tasks and perplexity per domain, and paired differences of two models.

Offline; tasks are the YAML files of a folder. What the harness reports is kept, plus one number per item, because only
pairing items shows a small difference honestly. Perplexities are per token and, as the harness has it, per word.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from configs.load import UserError
from evaluation import results

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
    """One task's items in the order of the task's file: the metric of each, and what an item chosen by chance has."""

    metric: str
    values: Array
    chance: float = 0.0


@dataclass(frozen=True)
class TextScores:
    """A perplexity task's items: the log-likelihood of each in nats, and the tokens and words it is spread over."""

    values: Array
    tokens: Array
    words: Array


Scores = dict[str, TaskScores | TextScores]
"""Task -> its items."""


def run_tasks(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: QualityArguments) -> Scores:
    """Score `model` on every task.

    Raises:
        UserError: a task that the folder does not hold.
    """
    os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"
    import datasets
    from lm_eval import simple_evaluate  # type: ignore[import-untyped, unused-ignore]
    from lm_eval.api import model as lm_model
    from lm_eval.api import task as lm_task
    from lm_eval.models import huggingface
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
    length = int(model.config.get_text_config().max_position_embeddings)
    for module in (lm_model, lm_task, huggingface):  # it draws a bar for every batch: they go when they are full
        module.tqdm = partial(tqdm, leave=False)
    lm = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=args.batch_size, max_length=length)
    manager = TaskManager(include_path=args.include_path, include_defaults=False)
    how = {"limit": args.limit, "bootstrap_iters": 0, "log_samples": True, "task_manager": manager}
    output = simple_evaluate(lm, tasks=list(args.tasks), **how)
    return {task: _scores(output["configs"][task], output["samples"][task], tokenizer) for task in args.tasks}


def _scores(
    config: Mapping[str, Any], samples: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> TaskScores | TextScores:
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    metric = str(config["metric_list"][0]["metric"])
    if config["output_type"] == "loglikelihood_rolling":
        texts = [sample["target"] for sample in samples]
        log_likelihood, words = np.array([sample[metric] for sample in samples], dtype=float).T
        tokens = np.array([len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]], dtype=float)
        return TextScores(log_likelihood, tokens, words)
    values, chance = np.array([float(sample[metric]) for sample in samples]), 0.0
    if config["output_type"] == "multiple_choice":
        chance = float(np.mean(1 / np.array([len(sample["doc"]["choices"]) for sample in samples])))
    return TaskScores(metric, values, chance)


def summarize(scores: Scores) -> results.Quality:
    """The value of every task with its standard error, every domain's perplexity, and their geometric mean."""
    tasks, perplexity, logs = {}, {}, []
    for name, items in scores.items():
        values, n = items.values, len(items.values)
        if isinstance(items, TextScores):
            per_token, per_word = (float(np.exp(-values.sum() / of.sum())) for of in (items.tokens, items.words))
            logs.append(np.log(per_token))
            found = results.DomainPerplexity(perplexity=per_token, word_perplexity=per_word, n=n)
            perplexity[name.removeprefix(PERPLEXITY)] = found
        else:
            value, stderr = float(values.mean()), float(stats.sem(values)) if n > 1 else None
            tasks[name] = results.TaskValue(metric=items.metric, value=value, stderr=stderr, n=n, chance=items.chance)
    mean = float(np.exp(np.mean(logs))) if logs else None
    return results.Quality(tasks=tasks, perplexity=perplexity, mean_perplexity=mean)


def differences(base: Scores, tuned: Scores) -> results.Difference:
    """Tuned minus base with paired 95 % intervals: tasks in their metric, perplexity per token as a relative change."""
    draw = np.random.default_rng(0)
    tasks, perplexity, ratios = {}, {}, []
    for name, before in base.items():
        if isinstance(before, TextScores):
            ratios.append(_log_ratio(before, tuned[name], draw))
            perplexity[name.removeprefix(PERPLEXITY)] = _relative(*ratios[-1])
        else:
            tasks[name] = _paired(before.values, tuned[name].values)
    if ratios:
        points, resampled = zip(*ratios, strict=True)
        perplexity[results.MEAN] = _relative(float(np.mean(points)), np.mean(resampled, axis=0))
    return results.Difference(tasks=tasks, perplexity=perplexity)


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
