"""The whole measurement: quality, routing, cache replay and decode of a base model and of router deltas for it.

`results.py` says what comes of it. Nothing is trained and nothing is written here.
"""

import itertools
import json
import multiprocessing
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import transformers

from data.pieces import document_beginnings
from evaluation import results
from evaluation.arguments import EvaluationArguments
from evaluation.decode import decode_in_turns
from evaluation.engine.device import find_device
from evaluation.engine.memory.division import BudgetTooSmall
from evaluation.engine.resident import compute_dtype
from evaluation.engine.sessions.plan import PROMPT_TOKENS, plan
from evaluation.engine.store.experts import ExpertStore
from evaluation.machine import machine_facts, machine_load, processor_times
from evaluation.measurement import Arm, Candidate, LoadedModel, Measurement, pieces_of_text
from evaluation.quality.batches import process_index
from evaluation.quality.cost import Cost
from evaluation.quality.tasks import check_chat_template, load_tasks
from evaluation.results import BASE, naming_the_place
from training.model.lazy_weights import empty_model
from training.model.loading import load_tokenizer, local_folder
from training.model.routers import find_routers
from training.objective.terms import ObjectiveArguments
from training.run_folder import router_delta
from training.run_folder.folder import code_commit
from training.sharding.launcher import is_asked_to_shard


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
    return Arm(about["objective"], {key: about["config"].get(key) for key in settings}, candidates)


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
    output: Path | None = None,
    expected: Callable[[Sequence[Cost]], None] = lambda _: None,
    found: Callable[[str, results.Run], None] = lambda *_: None,
    decoded: Callable[[Sequence[tuple[str, results.Decode]]], None] = lambda *_: None,
) -> results.Measured:
    """Measure the base, then every arm as it comes: a generator may train an arm when it is asked for.

    Args:
        output: the evaluation's own folder: in `answers/` answers are kept as they come, so that one that was killed goes on,
            and in `samples/` every item where that is asked for; None: nowhere.
        expected: told what the tasks will cost each model, before the first is asked.
        found: told the arm's name and what is known of a run: first its routing, then its quality too.
        decoded: told what was measured with one size of cache, for every run with its arm's name.

    Raises:
        UserError: see the parts.
    """
    model_dir = local_folder(model)
    device = find_device(args.device)  # before anything is measured
    transformers.utils.logging.disable_progress_bar()
    tasks = load_tasks(args.quality)  # so that a task that cannot be used is named first
    tokenizer = load_tokenizer(model_dir)
    check_chat_template(args.quality, tokenizer)
    is_first = process_index() == 0  # of several; the others only share the answering
    plans, too_small = divide_budgets(model, args) if is_first else ([], [])
    tokens, per_group = args.decode.prompt_tokens, args.decode.prompts_per_domain
    prompts = pieces_of_text(tokenizer, args, tasks, per_group=per_group, tokens=tokens, with_answers=False)
    tokens, per_group = args.routing.max_length, args.routing.requests_per_domain
    texts = pieces_of_text(tokenizer, args, tasks, per_group=per_group, tokens=tokens, with_answers=True)
    measured: dict[str, results.ArmResults] = {}
    with naming_the_place("what was measured"):
        facts = _model_facts(model, model_dir, args)
        untouched, base_scores, sides = Arm("", {}, [Candidate({}, None, [])]), None, []
        measurement = Measurement(model_dir, tokenizer, tasks, texts, args, output)
        loaded = LoadedModel(model_dir, args, device, is_kept=isinstance(arms, Sequence))
        for name, arm in itertools.chain([(BASE, untouched)], arms):
            told: Any = {"found": partial(found, name), "expected": expected if name == BASE and is_first else None}
            with naming_the_place(name):
                runs, scores = measurement.of_arm(loaded, name, arm, base_scores=base_scores, **told)
            base_scores = base_scores or scores
            objective, settings = arm.objective or None, arm.coefficients
            measured[name] = results.ArmResults(objective=objective, coefficients=settings, runs=runs)
            sides += [candidate.routers for candidate in arm.candidates]
        loaded.close()
        before, demand_bytes = processor_times(), facts.token_demand_bytes or 0
        every = [(name, run) for name, of_arm in measured.items() for run in of_arm.runs]
        holds_all = args.engine_options(dtype=args.dtype) is None and not is_asked_to_shard()
        budgets = None if holds_all else (args.memory_budget, args.expert_cache)
        how: Any = {"token_demand_bytes": demand_bytes, "device": device, "budgets": budgets, "lever": args.lever}
        sizes = decode_in_turns(model_dir, sides, prompts, args.decode, **how) if is_first else ()
        for rows in sizes:
            for (_, run), row in zip(every, rows, strict=True):
                run.decode = [*(run.decode or []), row]
            decoded([(name, row) for (name, _), row in zip(every, rows, strict=True)])
        busy = machine_load(before, processor_times())
    about: Any = {"budgets_too_small": too_small, "machine_load": busy, "lever": args.lever}
    return results.Measured(model=facts, plans=plans, arms=measured, **about)


def assemble(
    measured: results.Measured, *, command: str, config: dict[str, Any], seconds: Mapping[str, float]
) -> results.Results:
    """Add what someone needs to measure the same again."""
    facts: dict[str, Any] = {"commit": code_commit(), "config": config, "machine": machine_facts()}
    made = results.Reproduction(command=command, seconds=dict(seconds), **facts)
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return results.Results(created=created, reproduce=made, **dict(measured))


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
