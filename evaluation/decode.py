"""The decode part of the evaluation: real prompts on the paged engine at several budgets.

Unless a device's budget is given they are multiples of one token's demand (layers x K experts), because below one demand a
global LRU hits nothing.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, product
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
from evaluation.results import Decode, GroupDecode, HitRate
from evaluation.turns import in_turn
from training.model.host_memory import give_back_memory
from training.model.loading import load_pretrained
from training.model.routers import copy_into_routers, router_parameters

Answer = TypeVar("Answer")
Routers = Mapping[str, Tensor]
"""Parameter name -> weight of every router."""


@dataclass
class DecodeArguments:
    """What is decoded, and under which budgets."""

    demands: list[float] = field(default_factory=lambda: [0.5, 1.0, 2.0, 4.0])  # cache sizes in one token's demands
    # memory for everything in place of `demands`, as [4GiB, 8GiB]; not given: the evaluation's own budget, if it has one
    memory_budgets: list[str] = field(default_factory=list)
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
        for budget in self.memory_budgets:
            EngineOptions(memory_budget=budget)  # refuses what is no size


def decode_in_turns(
    model_dir: str,
    sides: Sequence[Routers],
    prompts_of: Mapping[str, Sequence[np.ndarray]],
    args: DecodeArguments,
    *,
    token_demand_bytes: int,
    device: torch.device,
    budgets: tuple[str | None, str | None] | None = None,
    lever: str | None = None,
) -> Iterator[list[Decode]]:
    """Decode every prompt greedily, cold, at every budget; after each of them what was measured of each side.

    All sides decode a prompt one after another before the next prompt, every second time in reverse, so that a machine
    that becomes slower or quicker favours none of them. `tokens_equal_resident` says whether the tokens were those of
    the same model with all experts in memory.

    Args:
        sides: the routers of each; empty for the base's own.
        prompts_of: of each group of text, as token ids.
        token_demand_bytes: the experts that one token uses in all layers, in the expert cache.
        budgets: the evaluation's memory for everything and for experts, one of them; None: the whole model fits.
        lever: see `EngineOptions`.
    """
    prompts = list(chain.from_iterable(prompts_of.values()))
    group_of = [name for name, of_group in prompts_of.items() for _ in of_group] * args.repeats
    references = _resident_tokens(model_dir, sides, prompts, args, device) if budgets is None else None
    chosen: dict[str, Any] = {"cache_policy": args.cache_policy, "cache_scope": args.cache_scope, "lever": lever}
    sizes = _sizes(args, token_demand_bytes, budgets)
    progress = tqdm(
        total=len(sizes) * args.repeats * len(prompts) * len(sides), desc="decode", unit="prompt", leave=False
    )
    for demands, size in sizes:
        options = EngineOptions(**size, **chosen, dtype=args.dtype, device=str(device), warn=False)  # the report warns
        decoded, facts = _decoded(model_dir, options, sides, prompts, args, progress)
        give_back_memory()  # the next engine counts on it
        settings = {
            **chosen,
            **facts,
            "demands": demands or facts["demands"],
            "memory_budget": size.get("memory_budget"),
        }
        settings |= {"token_demand_bytes": token_demand_bytes, "repeats": args.repeats}
        rows = []
        for number, results in enumerate(decoded):
            tokens = [result.token_ids for result in results]
            settings["tokens_equal_resident"] = (
                None if references is None else tokens == references[number] * args.repeats
            )
            groups = {
                name: GroupDecode.model_validate(
                    _kept(_measured(of_group, n_prompts=len(prompts_of[name])), GroupDecode)
                )
                for name in prompts_of
                if (of_group := [one for one, group in zip(results, group_of, strict=True) if group == name])
            }
            rows.append(Decode(**settings, groups=groups, **_measured(results, n_prompts=len(prompts))))
        yield rows
    progress.close()


def _decoded(
    model_dir: str, options: EngineOptions, sides: Sequence[Routers], prompts: Sequence[np.ndarray],
    args: DecodeArguments, progress: "tqdm[Any]",
) -> tuple[list[list[DecodeResult]], dict[str, Any]]:  # fmt: skip
    """What every side decodes with one size of cache, and that size; the engine is gone afterwards."""
    with load(model_dir, options) as (model, engine):

        def answer(prompt_ids: list[int]) -> DecodeResult:
            progress.update()
            return decode(model, engine, prompt_ids=prompt_ids, max_new_tokens=args.max_new_tokens)

        facts = {"expert_cache_bytes": engine.pool_bytes, "demands": engine.pool_bytes / engine.token_demand_bytes}
        return _answers(model, sides, prompts, answer, repeats=args.repeats), facts


def _sizes(
    args: DecodeArguments, token_demand_bytes: int, budgets: tuple[str | None, str | None] | None
) -> list[tuple[float | None, dict[str, Any]]]:
    """Every size that is decoded with: how many tokens' experts it holds, if it is chosen so, and the engine's options."""
    memory_budget, expert_cache = budgets or (None, None)
    if expert_cache is not None and not args.memory_budgets:
        return [(None, {"expert_cache": expert_cache})]
    if of_everything := args.memory_budgets or ([] if memory_budget is None else [memory_budget]):
        tokens = args.prompt_tokens + args.max_new_tokens
        return [(None, {"memory_budget": size, "context_tokens": tokens}) for size in of_everything]
    return [(demands, {"expert_cache": int(demands * token_demand_bytes)}) for demands in args.demands]


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
    read = sum(s.misses_by_phase["decode"] for s in stats)
    tokens = sum(s.tokens["decode"] for s in stats)
    times = {name: [getattr(r.timing, name) for r in results] for name in ("ttft_ms", "tpot_ms")}
    return {
        "hit_rate": HitRate(**hits),
        "experts_read_per_token": read / tokens if tokens else None,
        "bytes_read_per_token": read_bytes / tokens if tokens else None,
        **times,
        **{f"mean_{name}": _mean(values) for name, values in times.items()},
        "output_throughput": _mean([r.timing.output_throughput for r in results]),
        "n_prompts": n_prompts,
        "n_tokens": sum(len(result.token_ids) for result in results[:n_prompts]),
    }


def _kept(measured: dict[str, Any], part: type[GroupDecode]) -> dict[str, Any]:
    return {key: value for key, value in measured.items() if key in part.model_fields}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
