"""EOR, load and dead experts against numbers worked out by hand and a plain loop."""

import math

import numpy as np
import pytest

from evaluation.engine.cache.reuse import reuse_rate_per_layer, routing_summary
from evaluation.engine.cache.trace import RouteTrace


def trace_of(expert_ids: list[list[list[int]]], requests: list[int], *, num_experts: int) -> RouteTrace:
    tokens = len(expert_ids)
    return RouteTrace(
        expert_ids=np.array(expert_ids), phase=np.ones(tokens, dtype=np.uint8), request_id=np.array(requests),
        call=np.arange(tokens), num_experts=num_experts, layer_ids=tuple(range(len(expert_ids[0]))),
    )  # fmt: skip


def test_reuse_rate_is_the_shared_part_of_neighbouring_choices() -> None:
    trace = trace_of([[[0, 1], [0, 1]], [[1, 2], [0, 1]], [[3, 2], [2, 3]]], [0, 0, 0], num_experts=4)
    assert reuse_rate_per_layer(trace).tolist() == [0.5, 0.5]


def test_pairs_do_not_cross_requests() -> None:
    same = [[[0, 1]]] * 4
    assert reuse_rate_per_layer(trace_of([*same[:2], [[2, 3]], [[2, 3]]], [0, 0, 1, 1], num_experts=4)).tolist() == [
        1.0
    ]
    assert routing_summary(trace_of(same, [0, 1, 2, 3], num_experts=4))["reuse_rate_mean"] is None


def test_reuse_rate_equals_a_plain_loop_on_a_random_trace() -> None:
    draw = np.random.default_rng(0)
    ids = np.stack([[draw.permutation(9)[:3] for _ in range(2)] for _ in range(50)])
    requests = np.sort(draw.integers(0, 5, 50))
    shared = [
        [len(set(ids[t, layer]) & set(ids[t - 1, layer])) / 3 for t in range(1, 50) if requests[t] == requests[t - 1]]
        for layer in range(2)
    ]
    rates = reuse_rate_per_layer(trace_of(ids.tolist(), requests.tolist(), num_experts=9))
    assert rates == pytest.approx([np.mean(layer) for layer in shared])


def test_load_is_described_per_layer() -> None:
    summary = routing_summary(trace_of([[[0], [0]], [[1], [0]], [[2], [0]], [[3], [0]]], [0] * 4, num_experts=4))
    assert summary["chance_reuse_rate"] == 0.25
    assert summary["load_entropy_per_layer"] == pytest.approx([math.log(4), 0.0])
    assert summary["load_cv_per_layer"] == pytest.approx([0.0, math.sqrt(3)])
    assert summary["dead_experts_per_layer"] == [0, 3]
    assert summary["n_tokens"] == 4
