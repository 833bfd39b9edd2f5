"""Replay of a routing trace through any policy and cache size: what a cache would have missed, without any weights.

The rules are those of `pool.py`, the very code the live engine runs. Every request starts cold. numpy only.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from configs.load import UserError
from evaluation.engine.cache.counts import DECODE, PREFILL, CacheCounts, Counts
from evaluation.engine.cache.curve import LruCurve
from evaluation.engine.cache.policies import NEVER, WITH_PROFILE, Belady, Key, Policy, make_policy
from evaluation.engine.cache.pool import SCOPES, ExpertCache, event_order
from evaluation.engine.cache.trace import RouteTrace

POLICIES = (*WITH_PROFILE, "belady")


class Event(NamedTuple):
    """What one call brings to one layer (position among the MoE layers)."""

    layer: int
    phase: int
    keys: list[Key]  # distinct, in event order


Request = list[Event]
"""The events of one request in the engine's order: call by call, layer by layer."""


@dataclass(frozen=True)
class ReplayResult:
    """Counts of one replay; `by_layer` follows the trace's layers."""

    policy: str
    cache_scope: str
    slots: int  # of each layer for per_layer, of the one pool for global
    total: Counts
    prefill: Counts
    decode: Counts
    by_layer: list[Counts]
    bytes_read_per_token: float | None  # decode misses x expert bytes / decode tokens; None if either is unknown

    @property
    def accesses(self) -> int:
        return self.total.accesses

    @property
    def misses(self) -> int:
        return self.total.misses

    @property
    def first_touches(self) -> int:
        """Misses on experts that the request had not used before: no cache avoids them from a cold start."""
        return self.total.first_touches

    @property
    def hit_rate(self) -> float | None:
        return self.total.hit_rate


def replay(
    trace: RouteTrace, *, policy: str, cache_scope: str, slots: int, profile: RouteTrace | None = None,
    requests: list[Request] | None = None,
) -> ReplayResult:  # fmt: skip
    """Run a trace through one policy and one size.

    Args:
        policy: one of `POLICIES`. `belady` evicts what is used farthest in the future, among the experts outside the
            event; it is the optimum as long as every event fits its pool.
        cache_scope: `per_layer` (`slots` for each layer) or `global` (one pool of `slots` for all layers).
        profile: for `static`, a trace of the same model; see `make_policy`. Not for the others.
        requests: `requests_of(trace)`, to share it between several replays.

    Raises:
        UserError: unknown policy or scope, fewer slots than one token needs in one layer, or a profile that is missing
            or does not fit.
    """
    check_choice(trace, policy=policy, cache_scope=cache_scope, slots=slots, profile=profile)
    online = None if policy == "belady" else _online(trace, policy, profile)
    counts = CacheCounts(trace.layers)
    for request in requests_of(trace) if requests is None else requests:
        cache = ExpertCache(slots, trace.layers, scope=cache_scope, make_policy=online or _belady(request))
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
    return ReplayResult(
        policy=policy,
        cache_scope=cache_scope,
        slots=slots,
        total=counts.total(),
        prefill=counts.total(PREFILL),
        decode=counts.total(DECODE),
        by_layer=counts.by_layer(),
        bytes_read_per_token=_bytes_per_decoded_token(trace, counts),
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
    if policy != "belady":
        _online(trace, policy, profile)
    elif profile is not None:
        raise UserError("policy 'belady' takes no profile, only 'static' does; leave the profile out")


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
        requests[-1].extend(_call_events(trace, start, end, phase))
    return requests


def _call_events(trace: RouteTrace, start: int, end: int, phase: int) -> Iterator[Event]:
    for layer in range(trace.layers):
        experts = event_order(trace.expert_ids[start:end, layer])
        yield Event(layer, phase, [(layer, expert) for expert in experts])


def _online(trace: RouteTrace, policy: str, profile: RouteTrace | None) -> Callable[[], Policy]:
    return make_policy(policy, layers=trace.layers, num_experts=trace.num_experts, profile=profile)


def _belady(request: Request) -> Callable[[], Policy]:
    next_uses = _next_uses(request)
    return lambda: Belady(next_uses)


def _next_uses(request: Request) -> dict[Key, Iterator[int]]:
    """For every expert, at each of its uses, the number of the event of the next one; see `Belady`."""
    uses: dict[Key, list[int]] = {}
    for time, event in enumerate(request):
        for key in event.keys:
            uses.setdefault(key, []).append(time)
    return {key: iter([*times[1:], NEVER]) for key, times in uses.items()}


def _bytes_per_decoded_token(trace: RouteTrace, counts: CacheCounts) -> float | None:
    tokens = int((trace.phase == DECODE).sum())
    if trace.expert_bytes is None or not tokens:
        return None
    return counts.total(DECODE).misses * trace.expert_bytes / tokens


def replay_all(
    trace: RouteTrace,
    policies: Sequence[str],
    *,
    scopes: Sequence[str],
    sizes: Sequence[int],
    profile: RouteTrace | None = None,
) -> list[ReplayResult]:
    """Every policy in every scope at every size, and Belady at each for the regret of the others.

    Raises:
        UserError: something that cannot be replayed, before anything is.
    """
    policies = list(dict.fromkeys((*policies, "belady")))
    choices = [(policy, scope, slots) for scope in scopes for policy in policies for slots in sizes]
    profiles = {policy: profile if policy == "static" else None for policy in policies}
    for policy, scope, slots in choices:
        check_choice(trace, policy=policy, cache_scope=scope, slots=slots, profile=profiles[policy])
    requests = requests_of(trace) if choices else []
    return [
        replay(trace, policy=policy, cache_scope=scope, slots=slots, profile=profiles[policy], requests=requests)
        for policy, scope, slots in tqdm(choices, desc="replay", unit="size", leave=False)
    ]


def results_json(
    trace: RouteTrace, results: Sequence[ReplayResult], policies: Sequence[str] = POLICIES
) -> list[dict[str, Any]]:
    """One JSON object per result of these policies; regret against Belady where it ran at the same size and scope."""
    optimum = {(r.cache_scope, r.slots): r.misses for r in results if r.policy == "belady"}
    return [
        _result_json(trace, result, optimum.get((result.cache_scope, result.slots)))
        for result in results
        if result.policy in policies
    ]


def _result_json(trace: RouteTrace, result: ReplayResult, optimum_misses: int | None) -> dict[str, Any]:
    return {
        "policy": result.policy,
        "cache_scope": result.cache_scope,
        "slots": result.slots,
        **_counts_json(result.total),
        "prefill": _counts_json(result.prefill),
        "decode": _counts_json(result.decode),
        "per_layer": [
            {"layer": layer, **_counts_json(counts)}
            for layer, counts in zip(trace.layer_ids, result.by_layer, strict=True)
        ],
        "bytes_read_per_token": result.bytes_read_per_token,
        "policy_regret": result.misses / optimum_misses if optimum_misses else None,
    }


def _counts_json(counts: Counts) -> dict[str, Any]:
    return {
        "accesses": counts.accesses,
        "misses": counts.misses,
        "hit_rate": counts.hit_rate,
        "first_touches": counts.first_touches,
        "misses_without_first_touches": counts.misses - counts.first_touches,
    }
