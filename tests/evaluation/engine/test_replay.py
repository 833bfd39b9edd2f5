"""Replay: exact counts on fixed traces, cold starts, phases, and what it refuses."""

import subprocess
import sys

import numpy as np
import pytest

from configs.load import UserError
from evaluation.engine.replay import POLICIES, replay, requests_of
from evaluation.engine.route_trace import RouteTrace


def teacher_forced(
    expert_ids: list[list[list[int]]], *, requests: list[int] | None = None, experts: int = 8
) -> RouteTrace:
    tokens = len(expert_ids)
    return RouteTrace(
        np.array(expert_ids, dtype=np.uint8),
        phase=np.ones(tokens, np.uint8),
        request_id=np.array(requests or [0] * tokens, np.int32),
        call=np.arange(tokens, dtype=np.int32),
        num_experts=experts,
        layer_ids=tuple(range(len(expert_ids[0]))),
        expert_bytes=100,
    )


def fixed_trace() -> RouteTrace:
    """600 tokens, 3 layers, 3 of 12 experts, 2 requests, drifting preferences; integer arithmetic only."""
    state, tokens = 12345, []
    for token in range(600):
        layers = []
        for layer in range(3):
            chosen: list[int] = []
            while len(chosen) < 3:
                state = (1103515245 * state + 12345) % 2**31
                expert = (token // 40 + layer + min((state >> 16) % 12, (state >> 8) % 12)) % 12
                if expert not in chosen:
                    chosen.append(expert)
            layers.append(chosen)
        tokens.append(layers)
    return teacher_forced(tokens, requests=[0] * 300 + [1] * 300, experts=12)


GOLDEN = {  # scope -> policy -> misses with 3, 4, 6, 9 slots for each layer; the plain simulation of test_cache agrees
    "per_layer": {
        "lru": [3682, 3131, 2098, 782],
        "fifo": [3682, 3178, 2181, 965],
        "lfu": [3682, 3264, 2534, 1209],
        "lfru": [3682, 3125, 2131, 851],
        "decayed": [3682, 3151, 2103, 786],
        "belady": [3682, 2518, 1302, 410],
    },
    "global": {
        "lru": [3682, 3650, 2364, 848],
        "fifo": [4148, 3652, 2456, 1043],
        "lfu": [4578, 4071, 3044, 1457],
        "lfru": [4459, 3714, 2596, 995],
        "decayed": [4496, 3813, 2520, 912],
        "belady": [2600, 1955, 1078, 352],
    },
}


@pytest.mark.parametrize("scope", ["per_layer", "global"])
@pytest.mark.parametrize("policy", POLICIES)
def test_golden_misses_of_the_fixed_trace(policy: str, scope: str) -> None:
    trace = fixed_trace()
    sizes = [slots * (3 if scope == "global" else 1) for slots in (3, 4, 6, 9)]
    misses = [replay(trace, policy=policy, cache_scope=scope, slots=slots).misses for slots in sizes]
    assert misses == GOLDEN[scope][policy]


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
        alone = replay(trace, policy=policy, cache_scope="per_layer", slots=4)
        assert replay(trace, policy=policy, cache_scope="per_layer", slots=4, requests=requests) == alone


def test_what_cannot_be_replayed_is_refused() -> None:
    trace = teacher_forced([[[0, 1]]])
    with pytest.raises(UserError, match="unknown policy 'mru'; known: lru, fifo, lfu, lfru, decayed, belady"):
        replay(trace, policy="mru", cache_scope="global", slots=2)
    with pytest.raises(UserError, match="unknown cache scope 'both'; known: global, per_layer"):
        replay(trace, policy="lru", cache_scope="both", slots=2)
    with pytest.raises(UserError, match=r"1 slots cannot hold the 2 experts .* the smallest that works is 2"):
        replay(trace, policy="lru", cache_scope="global", slots=1)


def test_replay_needs_no_torch() -> None:
    code = "import sys, evaluation.engine.replay; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
