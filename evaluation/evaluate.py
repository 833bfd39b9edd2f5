"""`remoe evaluate`: quality, routing, cache replay and decode of a base model and of router deltas for it.

`evaluate` is what `remoe run` calls too: one results dictionary, whose layout `evaluation/report/markdown.py` shows.
"""

import json
import multiprocessing
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data.corpus import DOMAINS
from data.pieces import spread_pieces
from evaluation.decode import DecodeArguments, decode_in_turns, expert_sizes
from evaluation.engine.cache.curve import lru_curve
from evaluation.engine.cache.replay import lru_per_layer, replay, requests_of
from evaluation.engine.cache.reuse import routing_summary
from evaluation.engine.device import find_device
from evaluation.engine.sessions.plan import plan
from evaluation.machine import machine_facts
from evaluation.quality import QualityArguments, TaskScores, differences, run_tasks, summarize
from evaluation.tracing import teacher_forced_trace
from training.model.loading import load_pretrained, load_tokenizer, local_folder
from training.model.routers import find_routers
from training.run_folder import router_delta
from training.run_folder.folder import code_commit


@dataclass
class RoutingArguments:
    """The text whose routing is traced, teacher-forced; the prompts that are decoded are from the same split."""

    split: str = "test"  # of the shipped corpus
    domains: list[str] = field(default_factory=lambda: list(DOMAINS))
    requests_per_domain: int = 24
    max_length: int = 256  # tokens of a request; the replay starts cold with each


@dataclass
class ReplayArguments:
    """Which caches are simulated on the trace."""

    policies: list[str] = field(default_factory=lambda: ["lru", "lfu", "fifo", "belady"])
    cache_scope: str = "per_layer"
    slots: list[int] = field(default_factory=lambda: [4, 6, 8, 12, 16, 24, 32])


@dataclass
class PlanArguments:
    """Memory budgets that the report divides; none: no plan in it."""

    memory_budgets: list[str] = field(default_factory=list)  # for everything, for example [64MiB]
    context_tokens: int = 256  # tokens of prompt and answer to keep room for


@dataclass
class EvaluationArguments:
    """`remoe evaluate`: what is measured."""

    dtype: str = "auto"  # precision of quality and trace: as stored, or float32 or bfloat16
    device: str = "auto"  # of quality, trace and decode: the accelerator if there is one, or cpu, or cuda
    quality: QualityArguments = field(default_factory=QualityArguments)
    routing: RoutingArguments = field(default_factory=RoutingArguments)
    replay: ReplayArguments = field(default_factory=ReplayArguments)
    decode: DecodeArguments = field(default_factory=DecodeArguments)
    plan: PlanArguments = field(default_factory=PlanArguments)


@dataclass
class Candidate:
    """One trained run that is to be compared with the base."""

    router_delta: Path
    seed: int | None
    history: list[dict[str, Any]]


@dataclass
class Arm:
    """Runs of one objective that differ in their seed only."""

    objective: str
    coefficients: dict[str, Any]
    candidates: list[Candidate]


def divide_budgets(model: str, args: EvaluationArguments) -> list[dict[str, Any]]:
    """The plan of every memory budget, each made in a process of its own.

    There residents are measured beside nothing else, and the settings of a small budget end with it. A script that calls
    this needs `if __name__ == "__main__":`, as with anything that starts Python anew.

    Raises:
        UserError: a budget is too small, or the device is not there.
    """
    find_device(args.device)
    divided = partial(plan, local_folder(model), context_tokens=args.plan.context_tokens, dtype=args.decode.dtype)
    spawn, quiet = multiprocessing.get_context("spawn"), transformers.utils.logging.disable_progress_bar
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=quiet, max_tasks_per_child=1) as process:
        return [process.submit(divided, memory_budget=budget).result() for budget in args.plan.memory_budgets]


def evaluate(
    model: str, arms: Mapping[str, Arm], args: EvaluationArguments, *, plans: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Measure the base and every candidate.

    Args:
        plans: what `divide_budgets` found, if that was done already.

    Raises:
        UserError: see the parts; a delta that belongs to another base is found before anything is measured.
    """
    model_dir = local_folder(model)
    find_device(args.device)  # before anything is measured
    transformers.utils.logging.disable_progress_bar()
    weights = {id(c): router_delta.load_for(model_dir, c.router_delta) for arm in arms.values() for c in arm.candidates}
    plans = divide_budgets(model, args) if plans is None else plans
    tokenizer = load_tokenizer(model_dir)
    prompts = _pieces_of_text(
        tokenizer, args.routing.domains, args.decode.prompts_per_domain, args.decode.prompt_tokens, args.routing.split
    )
    base, base_scores = _measure(model_dir, None, tokenizer, args, name="base")
    results: dict[str, Any] = {"base": {"objective": None, "coefficients": {}, "runs": [base]}}
    for name, arm in arms.items():
        runs = []
        for candidate in arm.candidates:
            measured, scores = _measure(model_dir, weights[id(candidate)], tokenizer, args, name=name)
            runs.append(
                {**measured, "seed": candidate.seed, "history": candidate.history,
                 "difference": differences(base_scores, scores)}
            )  # fmt: skip
        results[name] = {"objective": arm.objective, "coefficients": arm.coefficients, "runs": runs}
    measured_runs = [measured for arm in results.values() for measured in arm["runs"]]
    routers = [None, *(weights[id(candidate)] for arm in arms.values() for candidate in arm.candidates)]
    decoded = decode_in_turns(model_dir, routers, prompts, args.decode, device=find_device(args.device))
    for measured, rows in zip(measured_runs, decoded, strict=True):
        measured["decode"] = rows
    facts = {"name": model, **_model_facts(model_dir, args)}
    return {"format_version": 1, "model": facts, "plans": plans, "arms": results}


def assemble(results: dict[str, Any], *, command: str, config: Any, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Add what someone needs to measure the same again."""
    reproduce = {
        "command": command, "commit": code_commit(), "config": config, "machine": machine_facts(), "seconds": dict(seconds)
    }  # fmt: skip
    return {"created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "reproduce": reproduce, **results}


def _measure(
    model_dir: str, weights: Mapping[str, Tensor] | None, tokenizer: PreTrainedTokenizerBase, args: EvaluationArguments, *,
    name: str,
) -> tuple[dict[str, Any], dict[str, TaskScores]]:  # fmt: skip
    model = load_pretrained(model_dir, dtype=args.dtype, device=find_device(args.device), router_delta=weights)
    scores = run_tasks(model, tokenizer, args.quality)
    routed = _routing(model, tokenizer, args, name=name)
    return {"seed": None, "history": [], "quality": summarize(scores), "difference": None, **routed}, scores


def _routing(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: EvaluationArguments, *, name: str
) -> dict[str, Any]:
    """Summary of the teacher-forced trace, LRU at every size, and its replay through every chosen policy and size."""
    routing = args.routing
    pieces = _pieces_of_text(tokenizer, routing.domains, routing.requests_per_domain, routing.max_length, routing.split)
    trace, nll = teacher_forced_trace(model, pieces, max_length=routing.max_length, progress=f"{name}: trace")
    requests = requests_of(trace)
    sizes = [slots for slots in args.replay.slots if trace.top_k <= slots <= trace.num_experts]
    scope, curve = args.replay.cache_scope, lru_curve(trace, cache_scope="per_layer")
    replays = [
        lru_per_layer(trace, curve, slots=slots)
        if (policy, scope) == ("lru", "per_layer")
        else replay(trace, policy=policy, cache_scope=scope, slots=slots, requests=requests)
        for policy in args.replay.policies
        for slots in sizes
    ]
    belady = {r.slots: r.misses for r in replays if r.policy == "belady"}
    rows = [
        {
            "policy": r.policy, "cache_scope": r.cache_scope, "slots": r.slots, "accesses": r.accesses, "misses": r.misses,
            "hit_rate": r.hit_rate, "first_touches": r.first_touches,
            "misses_without_first_touches": r.misses - r.first_touches,
            "misses_per_layer": [layer.misses for layer in r.by_layer],
            "policy_regret": r.misses / belady[r.slots] if belady.get(r.slots) else None,
        }
        for r in replays
    ]  # fmt: skip
    curves = {"per_layer": curve, "global": lru_curve(trace, cache_scope="global")}
    every_size = {
        name: {"accesses": int(one.accesses.sum()), "misses": one.misses.sum(axis=(0, 1)).tolist()}
        for name, one in curves.items()
    }
    return {"routing": {**routing_summary(trace), "nll": nll}, "replay": rows, "lru_curves": every_size}


def _pieces_of_text(
    tokenizer: PreTrainedTokenizerBase, domains: Sequence[str], per_domain: int, length: int, split: str
) -> list[np.ndarray]:
    """Pieces of `length` tokens, `per_domain` of each domain, evenly over the split and far apart in long documents."""
    return spread_pieces(
        tokenizer, split, domains, tokens=length, at_least=length + 1, every=4 * length, per_domain=per_domain
    )


def _model_facts(model_dir: str, args: EvaluationArguments) -> dict[str, Any]:
    model = load_pretrained(model_dir)
    router: Any = next(iter(find_routers(model).values()))
    return {
        "n_parameters": model.num_parameters(), "layers": len(find_routers(model)),
        "experts": int(router.num_experts), "top_k": int(router.top_k), "dtype": str(model.dtype).removeprefix("torch."),
        **expert_sizes(model_dir, dtype=args.decode.dtype),
    }  # fmt: skip


def read_history(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`; empty if there is none."""
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def coefficients(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a training config that says how strongly which term counts."""
    return {key: value for key, value in config.items() if key.endswith("_coef")} | {
        "cache_slots": config["cache_slots"]
    }
