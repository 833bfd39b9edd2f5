"""What is measured of one model, the base or a candidate, but for its decode: routing, replay and quality."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data.groups import Pieces, own_pieces
from data.pieces import spread_pieces
from evaluation import results
from evaluation.arguments import EvaluationArguments, ReplayArguments
from evaluation.engine.cache.curve import LruCurve, lru_curve
from evaluation.engine.cache.pool import SCOPES
from evaluation.engine.cache.replay import lru_per_layer, replay, requests_of, results_json
from evaluation.engine.cache.reuse import routing_summary
from evaluation.engine.cache.trace import RouteTrace
from evaluation.engine.engine import Engine
from evaluation.engine.loading import load
from evaluation.quality.batches import Answers, identity_of
from evaluation.quality.cost import Cost, costs
from evaluation.quality.differences import PERPLEXITY, differences, summarize
from evaluation.quality.prompts import task_pieces
from evaluation.quality.scores import Scores, TextScores, run_tasks
from evaluation.quality.tasks import LoadedTasks
from evaluation.tracing import mean_loss, teacher_forced_trace
from training.model.host_memory import give_back_memory
from training.model.loading import load_pretrained
from training.model.routers import copy_into_routers
from training.sharding.launcher import REPLICATED, is_asked_to_shard, make_accelerator, weight_layout
from training.sharding.layerwise import is_sharded, load_sharded


@dataclass
class Candidate:
    """One trained run that is to be compared with the base."""

    routers: Mapping[str, torch.Tensor]
    seed: int | None
    history: list[dict[str, Any]]  # the lines of its metrics.jsonl


@dataclass
class Arm:
    """Runs of one objective that differ in their seed only."""

    objective: str
    coefficients: dict[str, Any]
    candidates: list[Candidate]


class LoadedModel:
    """The model that arms are measured with, in memory, paged, or over processes; loaded when it is asked for.

    Args:
        is_kept: from arm to arm, as only routers differ. If not it is gone after each: the next may have to be trained.
    """

    def __init__(self, model_dir: str, args: EvaluationArguments, device: torch.device, *, is_kept: bool) -> None:
        self._model_dir, self._args, self._device, self._is_kept = model_dir, args, device, is_kept
        self._open = ExitStack()
        self._found: tuple[PreTrainedModel, Engine | None] | None = None

    def __enter__(self) -> tuple[PreTrainedModel, Engine | None]:
        if self._found is None:
            options = self._args.engine_options(dtype=self._args.dtype, device=str(self._device))
            if options is None:
                self._found = self._in_memory(), None
            else:
                self._found = self._open.enter_context(load(self._model_dir, options))
        return self._found

    def __exit__(self, *_: object) -> None:
        if not self._is_kept:
            self.close()

    def _in_memory(self) -> PreTrainedModel:
        if is_asked_to_shard():
            accelerator = make_accelerator(bf16=False)
            if (layout := weight_layout(accelerator)) != REPLICATED:
                return load_sharded(self._model_dir, accelerator, layout=layout, dtype=self._args.dtype)
        return load_pretrained(self._model_dir, dtype=self._args.dtype, device=self._device)

    def close(self) -> None:
        """Let go of it, at once: what comes next may need the memory."""
        self._found = None
        self._open.close()
        give_back_memory()


@dataclass(frozen=True)
class Measurement:
    """What is asked of every model alike.

    Attributes:
        texts: whose routing is traced, by group.
        output: a folder whose `answers/` keeps answers as they come and whose `samples/` gets every item; None: nowhere.
    """

    model_dir: str
    tokenizer: PreTrainedTokenizerBase
    tasks: LoadedTasks
    texts: Pieces
    args: EvaluationArguments
    output: Path | None

    def of_arm(
        self, loaded: LoadedModel, name: str, arm: Arm, *, base_scores: Scores | None, found: Callable[[results.Run], None],
        expected: Callable[[Sequence[Cost]], None] | None = None,
    ) -> tuple[list[results.Run], Scores]:  # fmt: skip
        """The runs of an arm, and what each item of each task was worth to the last of them."""
        runs = []
        with loaded as (model, engine):
            if expected is not None:
                expected(costs(self.tasks, self.args.quality, self.tokenizer, engine))
            for candidate in arm.candidates:
                if candidate.routers:
                    copy_into_routers(model, candidate.routers)
                samples = self._folder("samples", name, *([] if candidate.seed is None else [f"seed-{candidate.seed}"]))
                identity = identity_of(model, self.model_dir, engine)
                with Answers(self._folder("answers"), identity, together=is_sharded(model)) as answers:
                    told: Any = {"base_scores": base_scores, "found": found, "samples": samples}
                    run, scores = self.of_model(model, engine, candidate, answers, **told)
                found(run)
                runs.append(run)
        return runs, scores

    def of_model(
        self, model: PreTrainedModel, engine: Engine | None, candidate: Candidate, answers: Answers, *,
        base_scores: Scores | None, found: Callable[[results.Run], None] = lambda _: None, samples: Path | None = None,
    ) -> tuple[results.Run, Scores]:  # fmt: skip
        """One run of a model with the routers that it has; `found` is told of its routing before tasks are asked."""
        run, of_texts = self._routed(model, engine, candidate, answers)
        found(run)
        how: Any = {"tasks": self.tasks, "engine": engine, "answers": answers, "samples": samples}
        scores = run_tasks(model, self.tokenizer, self.args.quality, **how)
        if not any(isinstance(of_task, TextScores) for of_task in scores.values()):
            scores |= of_texts
        run.quality = summarize(scores)
        if base_scores is not None:
            run.difference = differences(base_scores, scores)
        return run, scores

    def _folder(self, *parts: str) -> Path | None:
        return None if self.output is None else self.output.joinpath(*parts)

    def _routed(
        self, model: PreTrainedModel, engine: Engine | None, candidate: Candidate, answers: Answers
    ) -> tuple[results.Run, Scores]:
        """Routing and replay of one model, and how well it predicts the same text; the rest of its quality is not known yet."""
        requests = [piece for of_group in self.texts.values() for piece in of_group]
        how: Any = {"max_length": self.args.routing.max_length, "engine": engine, "answers": answers}
        trace, losses_R = teacher_forced_trace(model, requests, progress="trace", **how)
        curves = {scope: lru_curve(trace, cache_scope=scope) for scope in SCOPES}
        groups = _of_groups(trace, self.texts, self.args.replay.slots)
        run = results.Run(
            seed=candidate.seed,
            history=candidate.history,
            quality=None,
            difference=None,
            routing=results.Routing(**routing_summary(trace), nll=mean_loss(trace, losses_R), groups=groups),
            replay=_replays(trace, curves["per_layer"], self.args.replay),
            lru_curves=results.LruCurves(**{scope: _at_every_size(curve) for scope, curve in curves.items()}),
            decode=None,
        )
        return run, self._predicted(losses_R)

    def _predicted(self, losses_R: np.ndarray) -> Scores:
        """Perplexity of every group of text, for tasks that measure none."""
        scores: Scores = {}
        requests = 0
        for name, pieces in self.texts.items():
            tokens = np.array([len(piece) - 1 for piece in pieces if len(piece) > 1], dtype=float)
            if len(tokens):
                own, requests = losses_R[requests : requests + len(tokens)], requests + len(tokens)
                scores[f"{PERPLEXITY}{name}"] = TextScores(-own, tokens, None)
        return scores


def _of_groups(trace: RouteTrace, texts: Pieces, sizes: Sequence[int]) -> dict[str, results.GroupRouting]:
    """The routing of each group's requests, which follow each other in the trace; those of one token are not in it."""
    counts = [sum(len(piece) > 1 for piece in of_group) for of_group in texts.values()]
    ends = np.cumsum([0, *counts])
    found = {}
    for name, first, end in zip(texts, ends, ends[1:], strict=False):
        if first == end:
            continue
        own = trace.where((trace.request_id >= first) & (trace.request_id < end))
        curve = lru_curve(own, cache_scope="per_layer")
        misses, accesses = curve.misses.sum(axis=(0, 1)), int(curve.accesses.sum())
        found[name] = results.GroupRouting(
            n_requests=int(end - first), n_tokens=own.tokens, reuse_rate_mean=routing_summary(own)["reuse_rate_mean"],
            lru_miss_rates={str(size): float(misses[size]) / accesses for size in sizes if own.top_k <= size < len(misses)},
        )  # fmt: skip
    return found


def _replays(trace: RouteTrace, curve: LruCurve, args: ReplayArguments) -> list[results.Replay]:
    """The trace through every chosen policy and size; LRU is read off its curve."""
    sizes = [slots for slots in args.slots if trace.top_k <= slots <= trace.num_experts]
    cold = partial(replay, trace, cache_scope="per_layer", requests=requests_of(trace))
    replays = [
        lru_per_layer(trace, curve, slots=slots) if policy == "lru" else cold(policy=policy, slots=slots)
        for policy, slots in itertools.product(args.policies, sizes)
    ]
    rows = []
    for row in results_json(trace, replays):
        kept = {key: value for key, value in row.items() if key in results.Replay.model_fields}
        rows.append(results.Replay(**kept, misses_per_layer=[layer["misses"] for layer in row["per_layer"]]))
    return rows


def _at_every_size(curve: LruCurve) -> results.LruCurve:
    return results.LruCurve(accesses=int(curve.accesses.sum()), misses=curve.misses.sum(axis=(0, 1)).tolist())


def pieces_of_text(
    tokenizer: PreTrainedTokenizerBase, args: EvaluationArguments, tasks: LoadedTasks, *, per_group: int, tokens: int,
    with_answers: bool,
) -> Pieces:  # fmt: skip
    """Pieces of at most `tokens` tokens of every group of text that is measured: domains of the corpus, tasks, or own text.

    Of the corpus they are evenly over the split and far apart in long documents.
    """
    routing = args.routing
    if routing.groups:
        return own_pieces(tokenizer, routing.groups, tokens=tokens, per_group=per_group)
    if routing.source == "tasks":
        asked: Any = {"tokens": tokens, "per_task": per_group, "with_answers": with_answers}
        return task_pieces(tasks, args.quality, tokenizer, **asked)
    apart = {"tokens": tokens, "at_least": tokens + 1, "every": 4 * tokens}
    pieces = spread_pieces(tokenizer, routing.split, routing.domains, per_domain=per_group, **apart)
    return {name: pieces[at * per_group : (at + 1) * per_group] for at, name in enumerate(routing.domains)}
