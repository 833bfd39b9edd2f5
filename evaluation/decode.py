"""The decode part of the evaluation: real prompts on the paged engine at several expert-cache budgets.

Budgets are multiples of one token's demand (layers x K experts), because below one demand a global LRU hits nothing.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from evaluation.engine.cache.counts import PHASES
from evaluation.engine.cache.policies import DEFAULT
from evaluation.engine.greedy import DecodeResult, decode, greedy
from evaluation.engine.loading import load
from evaluation.engine.options import EngineOptions
from evaluation.results import Decode, HitRate
from evaluation.turns import in_turn
from training.model.loading import load_pretrained
from training.model.routers import copy_into_routers, router_parameters

Answer = TypeVar("Answer")
Routers = Mapping[str, Tensor]
"""Parameter name -> weight of every router."""


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
    sides: Sequence[Routers],
    prompts: Sequence[np.ndarray],
    args: DecodeArguments,
    *,
    token_demand_bytes: int,
    device: torch.device,
) -> Iterator[list[Decode]]:
    """Decode every prompt greedily, cold, at every budget; after each of them what was measured of each side.

    All sides decode a prompt one after another before the next prompt, every second time in reverse, so that a machine
    that becomes slower or quicker favours none of them. `tokens_equal_resident` says whether the tokens were those of
    the same model with all experts in memory.

    Args:
        sides: the routers of each; empty for the base's own.
        token_demand_bytes: the experts that one token uses in all layers, in the expert cache.
    """
    references = _resident_tokens(model_dir, sides, prompts, args, device)
    chosen: dict[str, Any] = {"cache_policy": args.cache_policy, "cache_scope": args.cache_scope}
    progress = tqdm(
        total=len(args.demands) * args.repeats * len(prompts) * len(sides), desc="decode", unit="prompt", leave=False
    )
    for demands in args.demands:
        cache_bytes, where = int(demands * token_demand_bytes), str(device)
        options = EngineOptions(cache_bytes, **chosen, dtype=args.dtype, device=where, warn=False)  # the report warns
        with load(model_dir, options) as (model, engine):

            def answer(prompt_ids: list[int]) -> DecodeResult:
                progress.update()
                return decode(model, engine, prompt_ids=prompt_ids, max_new_tokens=args.max_new_tokens)

            decoded = _answers(model, sides, prompts, answer, repeats=args.repeats)
            settings = chosen | {"demands": demands, "expert_cache_bytes": engine.pool_bytes, "repeats": args.repeats}
        rows = []
        for results, reference in zip(decoded, references, strict=True):
            equal = [result.token_ids for result in results] == reference * args.repeats
            settings |= {"token_demand_bytes": token_demand_bytes, "tokens_equal_resident": equal}
            rows.append(Decode(**settings, **_measured(results, n_prompts=len(prompts))))
        yield rows
    progress.close()


def _resident_tokens(
    model_dir: str, sides: Sequence[Routers], prompts: Sequence[np.ndarray], args: DecodeArguments, device: torch.device
) -> list[list[list[int]]]:
    """What each side decodes with all experts in memory."""
    model = load_pretrained(model_dir, dtype=args.dtype, device=device)
    return _answers(model, sides, prompts, partial(greedy, model, max_new_tokens=args.max_new_tokens), repeats=1)


def _answers(
    model: PreTrainedModel, sides: Sequence[Routers], prompts: Sequence[np.ndarray],
    answer: Callable[[list[int]], Answer], *, repeats: int,
) -> list[list[Answer]]:  # fmt: skip
    """What the model answers with the routers of every side: for each side all prompts, then all of the next repeat."""
    original = {name: weight.detach().clone() for name, weight in router_parameters(model).items()}
    answers: list[list[Answer]] = [[] for _ in sides]
    for repeat, (number, prompt) in product(range(repeats), enumerate(prompts)):
        for side in in_turn(range(len(sides)), repeat + number):
            copy_into_routers(model, sides[side] or original)
            answers[side].append(answer(prompt.tolist()))
    return answers


def _measured(results: Sequence[DecodeResult], *, n_prompts: int) -> dict[str, Any]:
    """Ratios of counters, times of every turn and their means; names as in vLLM where it has one."""
    stats, hits = [result.stats for result in results], {}
    for phase in PHASES:
        accesses = sum(s.accesses_by_phase[phase] for s in stats)
        misses = sum(s.misses_by_phase[phase] for s in stats)
        hits[phase] = (accesses - misses) / accesses if accesses else None
    read_bytes = sum(s.bytes_read_by_phase["decode"] for s in stats)
    tokens = sum(s.tokens["decode"] for s in stats)
    times = {name: [getattr(r.timing, name) for r in results] for name in ("ttft_ms", "tpot_ms")}
    return {
        "hit_rate": HitRate(**hits),
        "bytes_read_per_token": read_bytes / tokens if tokens else None,
        **times,
        **{f"mean_{name}": _mean(values) for name, values in times.items()},
        "output_throughput": _mean([r.timing.output_throughput for r in results]),
        "n_prompts": n_prompts,
        "n_tokens": sum(len(result.token_ids) for result in results[:n_prompts]),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
