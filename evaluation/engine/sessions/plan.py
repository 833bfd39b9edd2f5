"""What a memory budget is divided into for a model, and what it buys: the division tried on the real engine.

Sizes are worked out by `memory/`; the times of computing and of a prompt are measured by decoding a few tokens; misses at other
sizes come from a routing trace, if one is given, and those of other divisions from a workload of conversations.
"""

import gc
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from configs.load import UserError
from evaluation.engine.cache.counts import DECODE
from evaluation.engine.cache.curve import lru_curve
from evaluation.engine.cache.policies import DEFAULT
from evaluation.engine.cache.trace import RouteTrace
from evaluation.engine.engine import Engine
from evaluation.engine.greedy import decode
from evaluation.engine.loading import load
from evaluation.engine.memory.division import BudgetTooSmall
from evaluation.engine.options import EngineOptions
from evaluation.engine.sessions.conversations import BLOCK_TOKENS
from evaluation.engine.sessions.workload import ChatRequest, run_once, splits
from evaluation.engine.slot_kind import READY, STORED
from evaluation.engine.store.bandwidth import calibrated
from evaluation.engine.store.experts import ExpertStore

PROMPT_TOKENS, NEW_TOKENS = 32, 16
"""What is decoded to learn how long computing takes."""
SHARES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
"""Cache sizes that are shown, in parts of the one the budget buys."""


def plan(
    model_dir: str,
    *,
    prompt_ids: Sequence[int],
    memory_budget: str,
    context_tokens: int,
    trace: RouteTrace | None = None,
    dtype: str = "auto",
    requests: Sequence[ChatRequest] = (),
    block_tokens: int = BLOCK_TOKENS,
) -> dict[str, Any]:
    """Divide the budget, try it, and predict other sizes.

    Args:
        prompt_ids: some text, decoded from to learn how long computing takes: `PROMPT_TOKENS` do.
        requests: a workload of conversations; it is run once, and every division that could serve it is predicted.

    Raises:
        UserError: see `load` and `run_once`; a trace of another model.
    """
    in_blocks = block_tokens if requests else None
    options = EngineOptions(None, memory_budget, context_tokens, prompt_tokens=in_blocks, dtype=dtype)
    with load(model_dir, options) as (model, engine):
        if trace is not None and (trace.layers, trace.num_experts) != (engine.demand.layers, engine.demand.num_experts):
            raise UserError(
                f"the trace has {trace.layers} MoE layers of {trace.num_experts} experts, {model_dir} has "
                f"{engine.demand.layers} of {engine.demand.num_experts}; write a trace of this model with `remoe trace`"
            )
        bandwidth = calibrated(ExpertStore(model_dir).shards)
        measured = _try(model, engine, prompt_ids)
        assert engine.division is not None, "a memory budget was given"
        division = asdict(engine.division) | {"expert_cache_bytes": engine.division.expert_bytes}
        workload = run_once(model, engine, requests, block_tokens=block_tokens) if requests else None
        sizes = [] if trace is None else _sizes(trace, engine, measured["compute_ms"], bandwidth.bytes_per_second)
        return {
            "model": model_dir,
            "division": division,
            "demand": {**asdict(engine.demand), "token_demand_bytes": engine.token_demand_bytes},
            "read_bandwidth": asdict(bandwidth),
            "measured": measured,
            "slot_kind": engine.slot_kind,
            "sizes": sizes,
            "splits": [] if workload is None else [asdict(s) for s in splits(workload, engine, policy=DEFAULT)],
        }


def slot_kinds(
    planned: dict[str, Any], *, prompt_ids: Sequence[int], memory_budget: str, context_tokens: int, dtype: str = "auto"
) -> list[dict[str, Any]]:
    """What the budget holds and how fast a token is with either kind of slots; empty where experts are not quantised.

    A kind for which the budget is too small has the message as `too_small`.

    Args:
        planned: what `plan` found, with one of the kinds; the other one is tried here.
    """
    model_dir = planned["model"]
    if not ExpertStore(model_dir).format.is_quantised:
        return []
    found = []
    for kind in (STORED, READY):
        try:
            if kind == planned["slot_kind"]:
                found.append(_held(kind, planned["demand"], planned["division"]) | planned["measured"])
                continue
            gc.collect()  # a model and its engine know each other: what `plan` loaded is still there
            with load(model_dir, EngineOptions(None, memory_budget, context_tokens, slots=kind, dtype=dtype)) as (
                model,
                engine,
            ):
                assert engine.division is not None, "a memory budget was given"
                held = _held(kind, asdict(engine.demand), asdict(engine.division))
                found.append(held | _try(model, engine, prompt_ids))
        except BudgetTooSmall as error:
            found.append({"slot_kind": kind, "too_small": str(error)})
    return found


def _held(kind: str, demand: dict[str, Any], division: dict[str, Any]) -> dict[str, Any]:
    experts = demand["layers"] * demand["num_experts"]
    slots = division["slots"] * division["pools"]
    return {"slot_kind": kind, "slot_bytes": demand["slot_bytes"], "slots": slots, "experts": experts}


def _try(model: PreTrainedModel, engine: Engine, prompt_ids: Sequence[int]) -> dict[str, float | None]:
    """Times of a short request on this very engine, warmed up once."""
    for _ in range(2):
        result = decode(model, engine, prompt_ids=prompt_ids, max_new_tokens=NEW_TOKENS)
    stall_ms = 1e3 * result.stats.stall_seconds["decode"] / max(1, result.stats.tokens["decode"])
    return {
        "prompt_tokens": len(prompt_ids),
        "ttft_ms": result.timing.ttft_ms,
        "tpot_ms": result.timing.tpot_ms,
        "stall_ms": stall_ms,
        "compute_ms": None if result.timing.tpot_ms is None else result.timing.tpot_ms - stall_ms,
    }


def _sizes(
    trace: RouteTrace, engine: Engine, compute_ms: float | None, bytes_per_second: float
) -> list[dict[str, float | None]]:
    """Cache sizes and what they cost per decoded token, with a global LRU; what is read overlaps no computing in this estimate.

    `saved_ms_per_mib` is of the last MiB, against the next smaller size.
    """
    demand = engine.demand
    bought = {int(share * engine.cache.total_slots) for share in SHARES}
    slots = np.array(sorted({min(demand.all_experts, max(demand.top_k, count)) for count in bought}))
    misses = lru_curve(trace, cache_scope="global").misses[DECODE, 0]
    per_token = misses[np.minimum(slots, len(misses) - 1)] / max(1, int((trace.phase == DECODE).sum()))
    read_bytes = per_token * engine.expert_bytes
    tpot_ms = (compute_ms or 0.0) + 1e3 * read_bytes / bytes_per_second
    cache_bytes = slots * demand.slot_bytes
    columns = {
        "slots": slots.tolist(),
        "expert_cache_bytes": cache_bytes.tolist(),
        "misses_per_token": per_token.tolist(),
        "bytes_read_per_token": read_bytes.tolist(),
        "expected_tpot_ms": tpot_ms.tolist(),
        "saved_ms_per_mib": [None, *(-np.diff(tpot_ms) / (np.diff(cache_bytes) / 2**20)).tolist()],
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
