"""Replay of a routing trace through any policy and cache size: what a cache would have missed, without any weights.

The rules are those of `pool.py`, the very code the live engine runs. Every request starts cold. numpy only.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise, product
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from configs.load import UserError
from evaluation.engine.cache.counts import DECODE, PREFILL, CacheCounts, Counts
from evaluation.engine.cache.curve import LruCurve
from evaluation.engine.cache.policies import NEVER, ONLINE, Belady, Key, Policy, Static
from evaluation.engine.cache.pool import SCOPES, ExpertCache, event_order
from evaluation.engine.cache.trace import RouteTrace

POLICIES = (*ONLINE, "static", "belady")


class Event(NamedTuple):
    """What one call brings to one layer (position among the MoE layers)."""

    layer: int
    phase: int
    keys: list[Key]  # distinct, in event order


Request = list[Event]
"""The events of one request in the engine's order: call by call, layer by layer."""


@dataclass(kw_only=True)
class ReplayResult(Counts):
    """Counts of one replay; `by_layer` follows the trace's layers."""

    policy: str
    cache_scope: str
    slots: int  # of each layer for per_layer, of the one pool for global
    prefill: Counts
    decode: Counts
    by_layer: list[Counts]
    bytes_read_per_token: float | None  # decode misses x expert bytes / decode tokens; None if either is unknown


def replay(
    trace: RouteTrace, *, policy: str, cache_scope: str, slots: int, profile: RouteTrace | None = None,
    requests: list[Request] | None = None,
) -> ReplayResult:  # fmt: skip
    """Run a trace through one policy and one size.

    Args:
        policy: one of `POLICIES`. `belady` evicts what is used farthest in the future, among the experts outside the
            event; it is the optimum as long as every event fits its pool.
        cache_scope: `per_layer` (`slots` for each layer) or `global` (one pool of `slots` for all layers).
        profile: for `static`, a trace of the same model. Not for the others.
        requests: `requests_of(trace)`, to share it between several replays.

    Raises:
        UserError: unknown policy or scope, fewer slots than one token needs in one layer, or a profile that is missing
            or does not fit.
    """
    check_choice(trace, policy=policy, cache_scope=cache_scope, slots=slots, profile=profile)
    counts = CacheCounts(trace.layers)
    for request in requests_of(trace) if requests is None else requests:
        cache = ExpertCache(slots, trace.layers, scope=cache_scope, make_policy=policy_maker(policy, request, profile))
        cache.counts = counts
        for layer, phase, keys in request:
            cache.serve(layer, keys, phase=phase)
    return _result(trace, counts, policy=policy, cache_scope=cache_scope, slots=slots)


def lru_per_layer(trace: RouteTrace, curve: LruCurve, *, slots: int) -> ReplayResult:
    """What `replay` gives for lru with `slots` of each layer, read off the trace's curve for one pool per layer."""
    assert curve.cache_scope == "per_layer", curve.cache_scope
    misses = curve.misses[..., min(slots, trace.num_experts)]
    counts = CacheCounts(trace.layers)
    for phase, layer in np.ndindex(misses.shape):
        of = (curve.accesses[phase, layer], misses[phase, layer], curve.first_touches[phase, layer])
        counts.add(phase, layer, *map(int, of))
    return _result(trace, counts, policy="lru", cache_scope="per_layer", slots=slots)


def _result(trace: RouteTrace, counts: CacheCounts, *, policy: str, cache_scope: str, slots: int) -> ReplayResult:
    prefill, decode, tokens = counts.total(PREFILL), counts.total(DECODE), int((trace.phase == DECODE).sum())
    return ReplayResult(
        **asdict(counts.total()),
        policy=policy,
        cache_scope=cache_scope,
        slots=slots,
        prefill=prefill,
        decode=decode,
        by_layer=counts.by_layer(),
        bytes_read_per_token=decode.misses * trace.expert_bytes / tokens if trace.expert_bytes and tokens else None,
    )


def check_choice(
    trace: RouteTrace, *, policy: str, cache_scope: str, slots: int, profile: RouteTrace | None = None
) -> None:
    """Refuse what `replay` cannot do, before any long work."""
    if policy not in POLICIES:
        raise UserError(f"unknown policy {policy!r}; known: {', '.join(POLICIES)}")
    if cache_scope not in SCOPES:
        raise UserError(f"unknown cache scope {cache_scope!r}; known: {', '.join(SCOPES)}")
    if slots < trace.top_k:
        raise UserError(
            f"{slots} slots cannot hold the {trace.top_k} experts that one token uses in a layer at the same time; "
            f"the smallest that works is {trace.top_k}"
        )
    if policy != "static" and profile is not None:
        raise UserError(f"policy {policy!r} takes no profile, only 'static' does; leave the profile out")
    if policy == "static" and profile is None:
        raise UserError(
            "policy 'static' keeps the experts that a profile uses most and was given none; "
            "write one with `remoe trace` on text like yours and pass it as the profile"
        )
    if profile is not None and (profile.layers, profile.num_experts) != (trace.layers, trace.num_experts):
        raise UserError(
            f"the profile is of a model with {profile.layers} MoE layers of {profile.num_experts} experts, this one has "
            f"{trace.layers} of {trace.num_experts}; write a trace of this model with `remoe trace`"
        )


def policy_maker(name: str, request: Request, profile: RouteTrace | None) -> Callable[[], Policy]:
    """What makes fresh policies of this name for a replay of `request`; `profile` is for `static`."""
    if name == "belady":
        return partial(Belady, _next_uses(request))
    if name == "static":
        assert profile is not None, "check_choice was passed"
        return partial(Static, {(layer, expert): int(n) for (layer, expert), n in np.ndenumerate(profile.expert_uses)})
    return ONLINE[name]


def requests_of(trace: RouteTrace) -> list[Request]:
    """The trace as events, request by request."""
    call_starts = np.flatnonzero(np.r_[True, np.diff(trace.call) != 0, True])
    request_ids = trace.request_id[call_starts[:-1]].tolist()
    phases = trace.phase[call_starts[:-1]].tolist()
    requests: list[Request] = []
    previous = None
    for request_id, phase, (start, end) in zip(request_ids, phases, pairwise(call_starts.tolist()), strict=True):
        if request_id != previous:
            requests.append([])
            previous = request_id
        for layer in range(trace.layers):
            experts = event_order(trace.expert_ids[start:end, layer])
            requests[-1].append(Event(layer, phase, [(layer, expert) for expert in experts]))
    return requests


def _next_uses(request: Request) -> dict[Key, Iterator[int]]:
    """For every expert, at each of its uses, the number of the event of the next one; see `Belady`."""
    uses: dict[Key, list[int]] = {}
    for time, event in enumerate(request):
        for key in event.keys:
            uses.setdefault(key, []).append(time)
    return {key: iter([*times[1:], NEVER]) for key, times in uses.items()}


def replay_all(
    trace: RouteTrace, policies: Sequence[str], *, scopes: Sequence[str], sizes: Sequence[int],
    profile: RouteTrace | None = None,
) -> list[ReplayResult]:  # fmt: skip
    """Every policy in every scope at every size, checked beforehand, and Belady at each, for regret."""
    policies = list(dict.fromkeys((*policies, "belady")))
    choices: list[dict[str, Any]] = [
        {"policy": policy, "cache_scope": scope, "slots": slots, "profile": profile if policy == "static" else None}
        for scope, policy, slots in product(scopes, policies, sizes)
    ]
    for choice in choices:
        check_choice(trace, **choice)
    requests = requests_of(trace) if choices else []
    choices_shown = tqdm(choices, desc="replay", unit="size", leave=False)
    return [replay(trace, **choice, requests=requests) for choice in choices_shown]


def results_json(
    trace: RouteTrace, results: Sequence[ReplayResult], policies: Sequence[str] = POLICIES
) -> list[dict[str, Any]]:
    """One JSON object per result of these policies; regret against Belady where it ran at the same size and scope."""
    optimum = {(r.cache_scope, r.slots): r.misses for r in results if r.policy == "belady"}
    shown = [result for result in results if result.policy in policies]
    return [_result_json(trace, result, optimum.get((result.cache_scope, result.slots))) for result in shown]


def _result_json(trace: RouteTrace, result: ReplayResult, optimum_misses: int | None) -> dict[str, Any]:
    layers = zip(trace.layer_ids, result.by_layer, strict=True)
    return {
        **{name: getattr(result, name) for name in ("policy", "cache_scope", "slots")},
        **_counts_json(result),
        "prefill": _counts_json(result.prefill),
        "decode": _counts_json(result.decode),
        "per_layer": [{"layer": layer, **_counts_json(counts)} for layer, counts in layers],
        "bytes_read_per_token": result.bytes_read_per_token,
        "policy_regret": result.misses / optimum_misses if optimum_misses else None,
    }


def _counts_json(counts: Counts) -> dict[str, Any]:
    names = ("accesses", "misses", "hit_rate", "first_touches", "misses_without_first_touches")
    return {name: getattr(counts, name) for name in names}
