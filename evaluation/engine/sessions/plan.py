"""What a memory budget is divided into for a model, and what it buys: the division tried on the real engine.

Sizes are worked out by `memory/`; the times of computing and of a prompt are measured by decoding a few tokens; misses at other
sizes come from a routing trace, if one is given, and those of other divisions from a workload of conversations.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from configs.load import UserError
from evaluation.engine.cache.counts import PHASES
from evaluation.engine.cache.curve import LruCurve, lru_curve
from evaluation.engine.cache.policies import DEFAULT
from evaluation.engine.cache.trace import RouteTrace
from evaluation.engine.engine import Engine
from evaluation.engine.greedy import decode
from evaluation.engine.loading import load
from evaluation.engine.options import EngineOptions
from evaluation.engine.sessions.conversations import BLOCK_TOKENS
from evaluation.engine.sessions.workload import ChatRequest, run_once, splits
from evaluation.engine.store.bandwidth import calibrated
from evaluation.engine.store.experts import ExpertStore

PROMPT_TOKENS, NEW_TOKENS = 32, 16
"""What is decoded to learn how long computing takes."""
SHARES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
"""Cache sizes that are shown, in parts of the one the budget buys."""


@dataclass(frozen=True)
class Point:
    """One cache size and what it costs per decoded token."""

    slots: int
    expert_cache_bytes: int
    misses_per_token: float
    bytes_read_per_token: float
    expected_tpot_ms: float
    saved_ms_per_mib: float | None  # of the last MiB, against the next smaller size shown


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
    options = EngineOptions(
        memory_budget=memory_budget,
        context_tokens=context_tokens,
        prompt_tokens=block_tokens if requests else None,
        dtype=dtype,
    )
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
        points = [] if trace is None else _points(trace, engine, measured["compute_ms"], bandwidth.bytes_per_second)
        return {
            "model": model_dir,
            "division": division,
            "demand": {**asdict(engine.demand), "token_demand_bytes": engine.token_demand_bytes},
            "read_bandwidth": asdict(bandwidth),
            "measured": measured,
            "sizes": [asdict(point) for point in points],
            "splits": [] if workload is None else [asdict(s) for s in splits(workload, engine, policy=DEFAULT)],
        }


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


def _points(trace: RouteTrace, engine: Engine, compute_ms: float | None, bytes_per_second: float) -> list[Point]:
    """A global LRU at several sizes; what is read overlaps no computing in this estimate."""
    misses = _decode_misses(lru_curve(trace, cache_scope="global"))
    tokens = max(1, int((trace.phase == PHASES.index("decode")).sum()))
    points: list[Point] = []
    slots_bought = engine.cache.total_slots
    for slots in sorted(
        {min(engine.demand.all_experts, max(engine.demand.top_k, int(s * slots_bought))) for s in SHARES}
    ):
        per_token = float(misses[min(slots, len(misses) - 1)]) / tokens
        read_bytes = per_token * engine.expert_bytes
        tpot_ms = (compute_ms or 0.0) + 1e3 * read_bytes / bytes_per_second
        cache_bytes = slots * engine.demand.slot_bytes
        saved = None
        if points:
            saved = (points[-1].expected_tpot_ms - tpot_ms) / ((cache_bytes - points[-1].expert_cache_bytes) / 2**20)
        points.append(Point(slots, cache_bytes, per_token, read_bytes, tpot_ms, saved))
    return points


def _decode_misses(curve: LruCurve) -> np.ndarray:
    """Misses of decoding by number of slots."""
    misses: np.ndarray = curve.misses[PHASES.index("decode"), 0]
    return misses
