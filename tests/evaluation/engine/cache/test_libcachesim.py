"""LRU and FIFO against libcachesim, which knows single accesses and nothing of events.

Where the two agree. An event of one expert is an access, so both policies agree on traces with one expert per token.
FIFO agrees nowhere else: one access at a time it may push out an expert that a later access of the same event wants, or
one of the event being served, which stay here. LRU agrees on all events that fit the cache, if each is expanded so that
no lookup depends on the event itself: first its experts, most recently used first, so that those that hit are asked for
while nothing has come in yet (a miss makes only experts below it leave); then all of them again in event order, which
hits and leaves the recency that the event leaves. Requests start cold, so each has a cache of its own.
"""

import itertools
from collections.abc import Iterator

import libcachesim
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.engine.cache.curve import lru_curve
from evaluation.engine.cache.replay import Event, Request, replay, requests_of
from evaluation.engine.cache.trace import RouteTrace
from tests.evaluation.engine.cache.made_traces import fixed_trace, traces

CACHES = {"lru": libcachesim.LRU, "fifo": libcachesim.FIFO}
LAYER = 1_000_000  # experts of layer n are n x LAYER and up there
HASH_BITS = 10  # its default table takes as long to make as a test


def hits(cache: libcachesim.CacheBase, layer: int, expert: int) -> bool:
    request = libcachesim.Request()
    request.obj_id, request.obj_size = layer * LAYER + expert, 1
    return bool(cache.get(request))


def pools(policy: str, scope: str, layers: int, slots: int) -> list[libcachesim.CacheBase]:
    if scope == "global":
        return [CACHES[policy](slots, hashpower=HASH_BITS)] * layers
    return [CACHES[policy](slots, hashpower=HASH_BITS) for _ in range(layers)]


def misses_of_accesses(trace: RouteTrace, policy: str, scope: str, slots: int) -> int:
    misses = 0
    for request in requests_of(trace):
        caches = pools(policy, scope, trace.layers, slots)
        misses += sum(not hits(caches[event.layer], *key) for event in request for key in event.keys)
    return misses


def misses_of_expanded_events(trace: RouteTrace, scope: str, slots: int) -> int:
    misses = 0
    for request in requests_of(trace):
        caches = pools("lru", scope, trace.layers, slots)
        for event, recent_first in most_recent_first(request):
            misses += sum(not hits(caches[event.layer], *key) for key in recent_first)
            assert all([hits(caches[event.layer], *key) for key in event.keys])
    return misses


def most_recent_first(request: Request) -> Iterator[tuple[Event, list[tuple[int, int]]]]:
    last_use: dict[tuple[int, int], int] = {}
    clock = itertools.count()
    for event in request:
        yield event, sorted(event.keys, key=lambda key: -last_use.get(key, -1))
        last_use |= {key: next(clock) for key in event.keys}


@pytest.mark.parametrize("scope", ["per_layer", "global"])
@pytest.mark.parametrize("policy", list(CACHES))
@given(trace=traces(top_k=1, longest_call=1), slots=st.integers(1, 12))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_events_of_one_expert_are_accesses(policy: str, scope: str, trace: RouteTrace, slots: int) -> None:
    expected = misses_of_accesses(trace, policy, scope, slots)
    assert replay(trace, policy=policy, cache_scope=scope, slots=slots).misses == expected


@pytest.mark.parametrize("scope", ["per_layer", "global"])
@given(trace=traces(longest_call=3), spare=st.integers(0, 3))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_lru_agrees_on_expanded_events(scope: str, trace: RouteTrace, spare: int) -> None:
    slots = spare + max(len(event.keys) for request in requests_of(trace) for event in request)
    expected = misses_of_expanded_events(trace, scope, slots)
    assert replay(trace, policy="lru", cache_scope=scope, slots=slots).misses == expected


@pytest.mark.parametrize("scope", ["per_layer", "global"])
def test_the_curve_agrees_on_the_fixed_trace(scope: str) -> None:
    trace = fixed_trace()
    misses = lru_curve(trace, cache_scope=scope).misses.sum(axis=(0, 1))
    for slots in (3, 5, 8, 11, 15, 24, 30):
        if slots < len(misses):
            assert misses[slots] == misses_of_expanded_events(trace, scope, slots)


def test_single_accesses_disagree_on_events_of_several_experts() -> None:
    """Else the expansion above would prove nothing."""
    trace = fixed_trace()
    direct = replay(trace, policy="lru", cache_scope="per_layer", slots=4).misses
    assert misses_of_accesses(trace, "lru", "per_layer", 4) != direct
