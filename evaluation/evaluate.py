"""The whole measurement: quality, routing, cache replay and decode of a base model and of router deltas for it.

`results.py` says what comes of it. Nothing is trained and nothing is written here.
"""

import itertools
import json
import multiprocessing
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data.corpus import DOMAINS
from data.groups import Pieces, own_pieces, source_of
from data.pieces import document_beginnings, spread_pieces
from evaluation import results
from evaluation.decode import DecodeArguments, decode_in_turns
from evaluation.engine.cache.curve import LruCurve, lru_curve
from evaluation.engine.cache.pool import SCOPES
from evaluation.engine.cache.replay import lru_per_layer, replay, requests_of, results_json
from evaluation.engine.cache.reuse import routing_summary
from evaluation.engine.cache.trace import RouteTrace
from evaluation.engine.device import find_device
from evaluation.engine.engine import Engine
from evaluation.engine.loading import load as load_paged
from evaluation.engine.memory.demand import budget_bytes
from evaluation.engine.memory.division import BudgetTooSmall
from evaluation.engine.options import EngineOptions
from evaluation.engine.resident import compute_dtype
from evaluation.engine.sessions.plan import PROMPT_TOKENS, plan
from evaluation.engine.store.experts import ExpertStore
from evaluation.machine import machine_facts, machine_load, processor_times
from evaluation.quality.differences import differences, summarize
from evaluation.quality.prompts import task_pieces
from evaluation.quality.scores import Scores, run_tasks
from evaluation.quality.tasks import LoadedTasks, QualityArguments, load_tasks
from evaluation.results import BASE, naming_the_place
from evaluation.tracing import teacher_forced_trace
from training.model.lazy_weights import empty_model
from training.model.loading import load_pretrained, load_tokenizer, local_folder
from training.model.routers import copy_into_routers, find_routers
from training.objective.terms import ObjectiveArguments
from training.run_folder import router_delta
from training.run_folder.folder import code_commit

SOURCES = ("corpus", "tasks")


@dataclass
class RoutingArguments:
    """The text whose routing is traced, teacher-forced; the prompts that are decoded are of the same text."""

    # corpus: what ships; tasks: the prompts of the tasks that are asked, each task a group. See `groups` for other text
    source: str = "corpus"
    # own text in the place of both: {name: file.txt, name: chats.jsonl, name: data set, name: {dataset_name: NAME,
    # dataset_split: SPLIT}}
    groups: dict[str, Any] = field(default_factory=dict)
    split: str = "test"  # of the shipped corpus
    domains: list[str] = field(default_factory=lambda: list(DOMAINS))  # of the shipped corpus
    requests_per_domain: int = 24  # or of each group
    max_length: int = 256  # tokens of a request; the replay starts cold with each

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(
                f"source is {self.source!r}; write one of {', '.join(SOURCES)}, or name own text in groups"
            )
        for name, given in self.groups.items():
            source_of(name, given)


@dataclass
class ReplayArguments:
    """Which caches are simulated on the trace."""

    policies: list[str] = field(default_factory=lambda: ["lru", "lfu", "fifo", "belady"])
    slots: list[int] = field(default_factory=lambda: [4, 6, 8, 12, 16, 24, 32])  # of each layer


@dataclass
class PlanArguments:
    """Memory budgets that the report divides; none: no plan in it."""

    memory_budgets: list[str] = field(default_factory=list)  # for everything, for example [64MiB]
    context_tokens: int = 256  # tokens of prompt and answer to keep room for

    def __post_init__(self) -> None:
        for budget in self.memory_budgets:
            budget_bytes(budget, smallest_bytes=1)  # refuses what is no size, before anything is trained or measured


@dataclass
class EvaluationArguments:
    """`remoe evaluate`: what is measured."""

    # memory for everything: experts are paged from disk for quality, trace and decode alike, and the process never holds
    # the model; 8GiB, or as `remoe plan` takes it. null, and no expert_cache: quality and trace hold it in memory whole
    memory_budget: str | None = None
    expert_cache: str | None = None  # the same with memory for experts alone: 2GiB, or 25% of all experts
    dtype: str = "auto"  # precision of quality and trace: as stored, or float32 or bfloat16
    device: str = "auto"  # of quality, trace and decode: the accelerator if there is one, or cpu, or cuda
    quality: QualityArguments = field(default_factory=QualityArguments)
    routing: RoutingArguments = field(default_factory=RoutingArguments)
    replay: ReplayArguments = field(default_factory=ReplayArguments)
    decode: DecodeArguments = field(default_factory=DecodeArguments)
    plan: PlanArguments = field(default_factory=PlanArguments)

    def __post_init__(self) -> None:
        self.engine_options(dtype=self.dtype)  # refuses what no engine could do

    def engine_options(self, *, dtype: str, device: str = "cpu") -> EngineOptions | None:
        """How quality and trace run on the engine; None: on the model in memory."""
        if self.memory_budget is None and self.expert_cache is None:
            return None
        tokens = self.decode.prompt_tokens + self.decode.max_new_tokens
        return EngineOptions(
            self.expert_cache, self.memory_budget, context_tokens=tokens, dtype=dtype, device=device, warn=False
        )


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


def trained_arm(model: str, deltas: Sequence[Path]) -> Arm:
    """The arm of router deltas that were trained alike.

    Raises:
        UserError: a folder is no delta, or one of another base.
    """
    model_dir, candidates = local_folder(model), []
    for folder in deltas:
        about = router_delta.describe(folder, needed=("objective", "config"))
        routers = router_delta.load_for(model_dir, folder)
        candidates.append(Candidate(routers, about["config"]["seed"], _history(folder.parent)))
    settings = [field.name for field in fields(ObjectiveArguments) if field.name != "objective"]
    return Arm(about["objective"], {key: about["config"][key] for key in settings}, candidates)


def divide_budgets(model: str, args: EvaluationArguments) -> tuple[list[results.Plan], list[results.TooSmall]]:
    """What becomes of every memory budget, each divided and tried in a process of its own, and which are too small.

    There residents are measured beside nothing else, and the settings of a small budget end with it. A script that calls
    this needs `if __name__ == "__main__":`, as with anything that starts Python anew.

    Raises:
        UserError: the device is not there.
    """
    find_device(args.device)
    model_dir, plans, too_small = local_folder(model), [], []
    (prompt_ids,) = document_beginnings(load_tokenizer(model_dir), "validation", tokens=PROMPT_TOKENS, count=1)
    divided = partial(plan, prompt_ids=prompt_ids, context_tokens=args.plan.context_tokens, dtype=args.decode.dtype)
    spawn, quiet = multiprocessing.get_context("spawn"), transformers.utils.logging.disable_progress_bar
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=quiet, max_tasks_per_child=1) as process:
        for budget in args.plan.memory_budgets:
            try:
                found = process.submit(divided, model_dir, memory_budget=budget).result()
                plans.append(results.Plan.model_validate({**found, "memory_budget": budget}))
            except BudgetTooSmall as error:
                said = str(error).rsplit("; ", 1)[-1]
                too_small.append(results.TooSmall(memory_budget=budget, too_small=said))
    return plans, too_small


def evaluate(
    model: str,
    arms: Iterable[tuple[str, Arm]],
    args: EvaluationArguments,
    *,
    found: Callable[[str, results.Run], None] = lambda *_: None,
    decoded: Callable[[Sequence[tuple[str, results.Decode]]], None] = lambda *_: None,
) -> results.Measured:
    """Measure the base, then every arm as it comes: a generator may train an arm when it is asked for.

    Args:
        found: told the arm's name and what is known of a run: first its routing, then its quality too.
        decoded: told what was measured with one size of cache, for every run with its arm's name.

    Raises:
        UserError: see the parts.
    """
    model_dir = local_folder(model)
    device = find_device(args.device)  # before anything is measured
    transformers.utils.logging.disable_progress_bar()
    tasks = load_tasks(args.quality)  # so that a task that cannot be used is named first
    plans, too_small = divide_budgets(model, args)
    tokenizer = load_tokenizer(model_dir)
    tokens, per_group = args.decode.prompt_tokens, args.decode.prompts_per_domain
    prompts = _pieces_of_text(tokenizer, args, tasks, per_group=per_group, tokens=tokens, with_answers=False)
    tokens, per_group = args.routing.max_length, args.routing.requests_per_domain
    texts = _pieces_of_text(tokenizer, args, tasks, per_group=per_group, tokens=tokens, with_answers=True)
    measured: dict[str, results.ArmResults] = {}
    with naming_the_place("what was measured"):
        facts = _model_facts(model, model_dir, args)
        untouched, base_scores, sides = Arm("", {}, [Candidate({}, None, [])]), None, []
        measure = partial(_measure_arm, tokenizer=tokenizer, tasks=tasks, texts=texts, args=args)
        loaded = _Loaded(model_dir, args, device, is_kept=isinstance(arms, Sequence))
        for name, arm in itertools.chain([(BASE, untouched)], arms):
            with naming_the_place(name), loaded as (model_, engine):
                runs, scores = measure(model_, engine, arm, base_scores=base_scores, found=partial(found, name))
            base_scores = base_scores or scores
            objective, settings = arm.objective or None, arm.coefficients
            measured[name] = results.ArmResults(objective=objective, coefficients=settings, runs=runs)
            sides += [candidate.routers for candidate in arm.candidates]
        loaded.close()
        before, demand_bytes = processor_times(), facts.token_demand_bytes or 0
        every = [(name, run) for name, of_arm in measured.items() for run in of_arm.runs]
        budgets = None if args.engine_options(dtype=args.dtype) is None else (args.memory_budget, args.expert_cache)
        how: Any = {"token_demand_bytes": demand_bytes, "device": device, "budgets": budgets}
        sizes = decode_in_turns(model_dir, sides, prompts, args.decode, **how)
        for rows in sizes:
            for (_, run), row in zip(every, rows, strict=True):
                run.decode = [*(run.decode or []), row]
            decoded([(name, row) for (name, _), row in zip(every, rows, strict=True)])
        busy = machine_load(before, processor_times())
    return results.Measured(model=facts, plans=plans, budgets_too_small=too_small, arms=measured, machine_load=busy)


def assemble(
    measured: results.Measured, *, command: str, config: dict[str, Any], seconds: Mapping[str, float]
) -> results.Results:
    """Add what someone needs to measure the same again."""
    facts: dict[str, Any] = {"commit": code_commit(), "config": config, "machine": machine_facts()}
    made = results.Reproduction(command=command, seconds=dict(seconds), **facts)
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return results.Results(created=created, reproduce=made, **dict(measured))


class _Loaded:
    """The model that arms are measured with, in memory or paged; loaded when it is asked for.

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
                self._found = load_pretrained(self._model_dir, dtype=self._args.dtype, device=self._device), None
            else:
                self._found = self._open.enter_context(load_paged(self._model_dir, options))
        return self._found

    def __exit__(self, *_: object) -> None:
        if not self._is_kept:
            self.close()

    def close(self) -> None:
        """Let go of it."""
        self._found = None
        self._open.close()


def _measure_arm(
    model: PreTrainedModel, engine: Engine | None, arm: Arm, *, tokenizer: PreTrainedTokenizerBase, tasks: LoadedTasks,
    texts: Pieces, args: EvaluationArguments, base_scores: Scores | None, found: Callable[[results.Run], None],
) -> tuple[list[results.Run], Scores]:  # fmt: skip
    """All but the decode.

    Returns:
        The runs, and what each item of each task was worth to the last of them.
    """
    runs = []
    for candidate in arm.candidates:
        if candidate.routers:
            copy_into_routers(model, candidate.routers)
        run = _routed(model, engine, texts, args, candidate)
        found(run)
        scores = run_tasks(model, tokenizer, args.quality, tasks=tasks, engine=engine)
        run.quality = summarize(scores)
        if base_scores is not None:
            run.difference = differences(base_scores, scores)
        found(run)
        runs.append(run)
    return runs, scores


def _routed(
    model: PreTrainedModel, engine: Engine | None, texts: Pieces, args: EvaluationArguments, candidate: Candidate
) -> results.Run:
    """Routing and replay of one model; its quality is not known yet."""
    requests = [piece for of_group in texts.values() for piece in of_group]
    trace, nll = teacher_forced_trace(
        model, requests, max_length=args.routing.max_length, progress="trace", engine=engine
    )
    curves = {scope: lru_curve(trace, cache_scope=scope) for scope in SCOPES}
    return results.Run(
        seed=candidate.seed,
        history=candidate.history,
        quality=None,
        difference=None,
        routing=results.Routing(**routing_summary(trace), nll=nll, groups=_of_groups(trace, texts, args.replay.slots)),
        replay=_replays(trace, curves["per_layer"], args.replay),
        lru_curves=results.LruCurves(**{scope: _at_every_size(curve) for scope, curve in curves.items()}),
        decode=None,
    )


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


def _pieces_of_text(
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


def _model_facts(name: str, model_dir: str, args: EvaluationArguments) -> results.ModelFacts:
    """Counted without any weights: on the meta device, and from the headers of the shards."""
    model, store = empty_model(model_dir, dtype="auto"), ExpertStore(model_dir)
    routers = find_routers(model)
    router: Any = next(iter(routers.values()))
    dtype = compute_dtype(args.decode.dtype, config=model.config, store=store)
    return results.ModelFacts(
        name=name,
        n_parameters=model.num_parameters(),
        layers=len(routers),
        experts=int(router.num_experts),
        top_k=int(router.top_k),
        expert_bytes=store.format.expert_bytes,
        token_demand_bytes=len(routers) * int(router.top_k) * store.record(dtype.itemsize).total_bytes,
        dtype=str(model.dtype).removeprefix("torch."),
    )


def _history(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`; empty if there is none."""
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
