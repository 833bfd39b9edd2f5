"""The decode part of the evaluation: real prompts on the paged engine at several expert-cache budgets.

Budgets are multiples of one token's demand (layers x K experts), because below one demand a global LRU hits nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from evaluation.engine.cache.policies import DEFAULT
from evaluation.engine.greedy import DecodeResult, decode, greedy
from evaluation.engine.loading import load
from evaluation.engine.options import EngineOptions
from training.model.loading import load_pretrained


@dataclass
class DecodeArguments:
    """What is decoded, and under which budgets."""

    demands: list[float] = field(default_factory=lambda: [0.5, 1.0, 2.0, 4.0])  # cache sizes in one token's demands
    prompts_per_domain: int = 2  # of routing.split
    prompt_tokens: int = 64
    max_new_tokens: int = 32
    repeats: int = 2  # for the times; with an even number all sides lie equally early and late
    cache_policy: str = DEFAULT
    cache_scope: str = "global"
    dtype: str = "auto"  # as stored, or float32 or bfloat16

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"repeats is {self.repeats}; write 1 or more, best an even number")


def decode_in_turns(
    model_dir: str,
    sides: Sequence[Mapping[str, Tensor] | None],
    prompts: Sequence[np.ndarray],
    args: DecodeArguments,
    *,
    device: torch.device,
) -> list[list[dict[str, Any]]]:
    """Decode every prompt greedily, cold, at every budget; for each side one row of measurements a budget.

    At a budget the sides take turns, every second repeat backwards, so that a machine that becomes slower or quicker
    favours none of them. `tokens_equal_resident` says whether the tokens were those of the same model with all experts
    in memory.

    Args:
        sides: the router weights of each, None for the base's.
    """
    references = [_resident_tokens(model_dir, weights, prompts, args, device) for weights in sides]
    demand_bytes = expert_sizes(model_dir, dtype=args.dtype)["token_demand_bytes"]
    rows: list[list[dict[str, Any]]] = [[] for _ in sides]
    progress = tqdm(total=len(args.demands) * args.repeats * len(sides), desc="decode", unit="turn")
    for demands in args.demands:
        decoded: list[list[DecodeResult]] = [[] for _ in sides]
        pool = {}
        options = EngineOptions(
            expert_cache=int(demands * demand_bytes),
            cache_policy=args.cache_policy,
            cache_scope=args.cache_scope,
            dtype=args.dtype,
            device=str(device),
            warn=False,  # the report says what a small budget does
        )
        for repeat in range(args.repeats):
            for side in range(len(sides))[:: -1 if repeat % 2 else 1]:
                with load(model_dir, options, router_delta=sides[side]) as (model, engine):
                    decoded[side] += [
                        decode(model, engine, prompt_ids=p.tolist(), max_new_tokens=args.max_new_tokens)
                        for p in prompts
                    ]
                    pool = {
                        "demands": demands,
                        "repeats": args.repeats,
                        "expert_cache_bytes": engine.pool_bytes,
                        "token_demand_bytes": engine.token_demand_bytes,
                    }
                progress.update()
        for results, reference, own_rows in zip(decoded, references, rows, strict=True):
            equal = [result.token_ids for result in results] == reference * args.repeats
            measured = _measured(results, n_prompts=len(prompts))
            own_rows.append({**pool, **measured, "tokens_equal_resident": equal})
    progress.close()
    return rows


def expert_sizes(model_dir: str, *, dtype: str = "auto") -> dict[str, int]:
    """`expert_bytes` on disk and `token_demand_bytes` in the cache."""
    with load(model_dir, EngineOptions(expert_cache="100%", dtype=dtype)) as (_, engine):
        return {"expert_bytes": engine.expert_bytes, "token_demand_bytes": engine.token_demand_bytes}


def _resident_tokens(
    model_dir: str,
    weights: Mapping[str, Tensor] | None,
    prompts: Sequence[np.ndarray],
    args: DecodeArguments,
    device: torch.device,
) -> list[list[int]]:
    model = load_pretrained(model_dir, dtype=args.dtype, device=device, router_delta=weights)
    return [greedy(model, prompt.tolist(), max_new_tokens=args.max_new_tokens) for prompt in prompts]


def _measured(results: Sequence[DecodeResult], *, n_prompts: int) -> dict[str, Any]:
    """Ratios of counters, means of times over all repeats; names as in vLLM where it has one."""
    hits = {
        phase: _ratio(
            sum(r.stats.accesses_by_phase[phase] - r.stats.misses_by_phase[phase] for r in results),
            sum(r.stats.accesses_by_phase[phase] for r in results),
        )
        for phase in ("prefill", "decode")
    }
    decoded = sum(r.stats.tokens["decode"] for r in results)
    return {
        "hit_rate": hits,
        "bytes_read_per_token": _ratio(sum(r.stats.bytes_read_by_phase["decode"] for r in results), decoded),
        "mean_ttft_ms": _mean([r.timing.ttft_ms for r in results]),
        "mean_tpot_ms": _mean([r.timing.tpot_ms for r in results]),
        "output_throughput": _mean([r.timing.output_throughput for r in results]),
        "n_prompts": n_prompts,
        "n_tokens": sum(len(result.token_ids) for result in results[:n_prompts]),
    }


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
