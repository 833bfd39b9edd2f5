"""The one-pass curve against direct simulation at every size, on random traces and on one that is followed by hand."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings

from configs.load import UserError
from evaluation.engine.cache import curve, stacks
from evaluation.engine.cache.counts import DECODE, PREFILL
from evaluation.engine.cache.curve import LruCurve, lru_curve
from evaluation.engine.cache.replay import lru_per_layer, replay, requests_of
from evaluation.engine.cache.trace import RouteTrace
from tests.evaluation.engine.cache.made_traces import traces


def smallest_sizes(trace: RouteTrace, found: LruCurve) -> range:
    return range(trace.top_k, found.misses.shape[-1])


@pytest.mark.parametrize("scope", ["per_layer", "global"])
@pytest.mark.parametrize(
    ("lanes", "segment_calls", "old_turnovers"),
    [(1, 1, 16), (1, 4, 0), (6, 3, 1), (9, 2, 2), (stacks.LANES, stacks.SEGMENT_CALLS, curve.OLD_TURNOVERS)],
    ids=["blocks of one call", "all ages old", "some ages old", "segments of two calls", "as it is"],
)
@given(trace=traces())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_the_curve_is_the_direct_simulation_at_every_size(
    scope: str, lanes: int, segment_calls: int, old_turnovers: int, trace: RouteTrace
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stacks, "LANES", lanes)
        patch.setattr(stacks, "SEGMENT_CALLS", segment_calls)
        patch.setattr(curve, "OLD_TURNOVERS", old_turnovers)
        found = lru_curve(trace, cache_scope=scope)
    requests = requests_of(trace)
    for slots in smallest_sizes(trace, found):
        direct = replay(trace, policy="lru", cache_scope=scope, slots=slots, requests=requests)
        assert found.misses[:, :, slots].sum(axis=1).tolist() == [direct.prefill.misses, direct.decode.misses]
        assert found.first_touches.sum() == direct.first_touches
        assert found.accesses.sum() == direct.accesses
        if scope == "per_layer":
            assert lru_per_layer(trace, found, slots=slots) == direct


def long_trace(tokens: int, *, experts: int) -> RouteTrace:
    """Two layers, 3 experts of a token; some experts far rarer than others; prompts of 10 tokens, 200 to a request."""
    random = np.random.default_rng(1)
    scores = random.random((tokens, 2, experts)) * np.linspace(0.55, 1, experts)
    token = np.arange(tokens)
    prompt = token % 200 < 10
    return RouteTrace(
        np.argsort(-scores, axis=-1)[..., :3].astype(np.uint16),
        phase=np.where(prompt, PREFILL, DECODE),
        request_id=token // 200,
        call=np.where(prompt, token - token % 200, token),
        num_experts=experts,
        layer_ids=(0, 1),
    )


@pytest.mark.parametrize("scope", ["per_layer", "global"])
def test_more_than_256_experts_and_requests_that_cross_blocks(scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "LANES", 6)
    monkeypatch.setattr(curve, "OLD_TURNOVERS", 1)
    trace = long_trace(900, experts=300)
    found = lru_curve(trace, cache_scope=scope)
    for slots in (3, 40, 250, 290, 500):
        if slots < found.misses.shape[-1]:
            direct = replay(trace, policy="lru", cache_scope=scope, slots=slots)
            assert found.misses[..., slots].sum(axis=1).tolist() == [direct.prefill.misses, direct.decode.misses]


@pytest.mark.parametrize("scope", ["per_layer", "global"])
def test_memory_does_not_grow_with_the_trace(scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "LANES", 16)
    peaks = [peak_bytes(long_trace(tokens, experts=20), scope) for tokens in (2_000, 20_000)]
    assert peaks[1] < 2 * peaks[0]  # not 10: how far the thread is ahead moves either by a quarter


def peak_bytes(trace: RouteTrace, scope: str) -> int:
    """The most that Python and numpy held at a time on top of what there was before."""
    tracemalloc.start()
    lru_curve(trace, cache_scope=scope)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@given(trace=traces())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_misses_only_fall_with_size_and_end_at_the_first_touches(trace: RouteTrace) -> None:
    for scope in ("per_layer", "global"):
        found = lru_curve(trace, cache_scope=scope)
        assert (np.diff(found.misses, axis=-1) <= 0).all()
        assert (found.misses[..., 0] == found.accesses).all()
        assert (found.misses[..., -1] == found.first_touches).all()


def test_a_curve_that_can_be_followed_by_hand() -> None:
    """0 1 2 0 1: both come back at distance 3."""
    ids = np.array([[[0]], [[1]], [[2]], [[0]], [[1]]], np.uint8)
    trace = RouteTrace(ids, np.ones(5, int), np.zeros(5, int), np.arange(5), num_experts=4, layer_ids=(0,))
    assert lru_curve(trace, cache_scope="global").misses[DECODE, 0].tolist() == [5, 5, 5, 3, 3]


def test_an_unknown_scope_is_refused() -> None:
    ids = np.zeros((1, 1, 1), np.uint8)
    trace = RouteTrace(ids, np.ones(1, int), np.zeros(1, int), np.zeros(1, int), num_experts=1, layer_ids=(0,))
    with pytest.raises(UserError, match="unknown cache scope 'both'"):
        lru_curve(trace, cache_scope="both")
