"""Replay: exact counts on fixed traces, cold starts, phases, and what it refuses."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.load import UserError
from evaluation.engine.cache.curve import lru_curve
from evaluation.engine.cache.replay import POLICIES, Request, replay, requests_of
from evaluation.engine.cache.trace import RouteTrace
from tests.evaluation.engine.cache.made_traces import fixed_trace, teacher_forced, traces

GOLDEN = {  # scope -> policy -> misses with 3, 4, 6, 9 slots for each layer; the plain simulation of test_cache agrees
    "per_layer": {
        "lru": [3682, 3131, 2098, 782],
        "fifo": [3682, 3178, 2181, 965],
        "lfu": [3682, 3264, 2534, 1209],
        "lfru": [3682, 3125, 2131, 851],
        "decayed": [3682, 3049, 1951, 781],
        "static": [3682, 3185, 2261, 1065],
        "belady": [3682, 2518, 1302, 410],
    },
    "global": {
        "lru": [3682, 3650, 2364, 848],
        "fifo": [4148, 3652, 2456, 1043],
        "lfu": [4578, 4071, 3044, 1457],
        "lfru": [4459, 3714, 2596, 995],
        "decayed": [3658, 3043, 1995, 778],
        "static": [4322, 3781, 2815, 1268],
        "belady": [2600, 1955, 1078, 352],
    },
}


@pytest.mark.parametrize("scope", ["per_layer", "global"])
@pytest.mark.parametrize("policy", POLICIES)
def test_golden_misses_of_the_fixed_trace(policy: str, scope: str) -> None:
    trace, profile = fixed_trace(), fixed_trace(300) if policy == "static" else None
    sizes = [slots * (3 if scope == "global" else 1) for slots in (3, 4, 6, 9)]
    misses = [replay(trace, policy=policy, cache_scope=scope, slots=slots, profile=profile).misses for slots in sizes]
    assert misses == GOLDEN[scope][policy]


def misses(trace: RouteTrace, policy: str, scope: str, slots: int, requests: list[Request]) -> int:
    profile = trace if policy == "static" else None
    return replay(trace, policy=policy, cache_scope=scope, slots=slots, profile=profile, requests=requests).misses


@pytest.mark.parametrize("scope", ["per_layer", "global"])
@given(trace=traces(longest_call=3), spare=st.integers(0, 5))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_belady_is_never_above_a_policy(scope: str, trace: RouteTrace, spare: int) -> None:
    """At any size that holds the largest event; a smaller pool lets experts of it pass, in an order of its own."""
    requests = requests_of(trace)
    slots = spare + max(len(event.keys) for request in requests for event in request)
    optimum = misses(trace, "belady", scope, slots, requests)
    for policy in POLICIES:
        assert optimum <= misses(trace, policy, scope, slots, requests), policy


@pytest.mark.parametrize("scope", ["per_layer", "global"])
@given(trace=traces())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_lru_never_gains_misses_with_size(scope: str, trace: RouteTrace) -> None:
    """Also where events are larger than the pool."""
    requests = requests_of(trace)
    everything = trace.num_experts * (trace.layers if scope == "global" else 1)
    by_size = [misses(trace, "lru", scope, slots, requests) for slots in range(trace.top_k, everything + 1)]
    assert by_size == sorted(by_size, reverse=True)
    assert by_size[-1] == lru_curve(trace, cache_scope=scope).first_touches.sum()


def test_counts_of_a_trace_that_can_be_followed_by_hand() -> None:
    """With 2 slots: 0 1 come in, 2 pushes 0 out for lru (0 is needed next, so Belady gives 1 up), and so on."""
    trace = teacher_forced([[[0]], [[1]], [[2]], [[0]], [[1]]])
    lru = replay(trace, policy="lru", cache_scope="per_layer", slots=2)
    assert (lru.accesses, lru.misses, lru.first_touches, lru.hit_rate) == (5, 5, 3, 0)
    belady = replay(trace, policy="belady", cache_scope="per_layer", slots=2)
    assert (belady.accesses, belady.misses, belady.first_touches) == (5, 4, 3)
    assert belady.hit_rate == pytest.approx(0.2)
    assert belady.bytes_read_per_token == 4 * 100 / 5


def test_a_global_recency_cache_that_the_other_layers_fill_never_hits() -> None:
    """Between two uses of an expert the other layers bring (layers - 1) x top_k: up to that size nothing survives."""
    trace = teacher_forced([[[0, 1], [0, 1], [0, 1]]] * 20)
    for policy in ("lru", "fifo"):
        assert replay(trace, policy=policy, cache_scope="global", slots=4).hit_rate == 0
        assert replay(trace, policy=policy, cache_scope="global", slots=6).misses == 6
    assert 6 < replay(trace, policy="lru", cache_scope="global", slots=5).misses < 120
    assert replay(trace, policy="lru", cache_scope="per_layer", slots=2).misses == 6


def test_every_request_starts_cold() -> None:
    trace = teacher_forced([[[0, 1]]] * 4, requests=[0, 0, 7, 7])
    result = replay(trace, policy="lru", cache_scope="per_layer", slots=4)
    assert (result.misses, result.first_touches) == (4, 4)


def test_tokens_of_one_call_are_one_event() -> None:
    ids = np.array([[[0, 1]], [[1, 2]], [[2, 0]]], np.uint8)
    zeros = np.zeros(3, np.int32)
    trace = RouteTrace(ids, phase=zeros, request_id=zeros, call=zeros, num_experts=4, layer_ids=(5,))
    result = replay(trace, policy="lru", cache_scope="per_layer", slots=2)
    assert (result.prefill.accesses, result.prefill.misses, result.decode.accesses) == (3, 3, 0)
    assert result.decode.hit_rate is None
    assert result.bytes_read_per_token is None


def test_layers_are_counted_apart() -> None:
    trace = teacher_forced([[[0, 1], [0, 1]], [[0, 1], [2, 3]]])
    result = replay(trace, policy="fifo", cache_scope="per_layer", slots=2)
    assert [(layer.accesses, layer.misses) for layer in result.by_layer] == [(4, 2), (4, 4)]


def test_shared_requests_give_the_same_counts() -> None:
    trace = fixed_trace()
    requests = requests_of(trace)
    for policy in POLICIES:
        profile = trace if policy == "static" else None
        alone = replay(trace, policy=policy, cache_scope="per_layer", slots=4, profile=profile)
        shared = replay(trace, policy=policy, cache_scope="per_layer", slots=4, profile=profile, requests=requests)
        assert shared == alone


def test_what_cannot_be_replayed_is_refused() -> None:
    trace = teacher_forced([[[0, 1]]])
    with pytest.raises(UserError, match="unknown policy 'mru'; known: lru, fifo, lfu, lfru, decayed, static, belady"):
        replay(trace, policy="mru", cache_scope="global", slots=2)
    with pytest.raises(UserError, match="unknown cache scope 'both'; known: global, per_layer"):
        replay(trace, policy="lru", cache_scope="both", slots=2)
    with pytest.raises(UserError, match="'static' keeps the experts that a profile uses most and was given none"):
        replay(trace, policy="static", cache_scope="global", slots=2)
    with pytest.raises(UserError, match="3 MoE layers of 12 experts, this one has 1 of 8"):
        replay(trace, policy="static", cache_scope="global", slots=2, profile=fixed_trace(30))
    with pytest.raises(UserError, match="'lru' takes no profile"):
        replay(trace, policy="lru", cache_scope="global", slots=2, profile=trace)
    with pytest.raises(UserError, match="'belady' takes no profile"):
        replay(trace, policy="belady", cache_scope="global", slots=2, profile=trace)
    with pytest.raises(UserError, match=r"1 slots cannot hold the 2 experts .* the smallest that works is 2"):
        replay(trace, policy="lru", cache_scope="global", slots=1)


def test_replay_needs_no_torch() -> None:
    code = "import sys, evaluation.engine.cache.replay; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
