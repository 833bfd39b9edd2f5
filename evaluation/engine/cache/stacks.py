"""The LRU stacks of a trace's layers: how deep every accessed expert lies in its layer's, and how old its last use is.

A block of calls is cut into segments that are stepped side by side, call by call, so that every numpy operation works
on many lanes (a lane is one layer of one segment); the stacks a segment starts with come from the last uses before it.
Memory does not grow with the trace. For `curve.py`; knows no cache and no size.
Axes: T tokens, S segments of a block, L MoE layers, E experts of a layer, K experts chosen, N lanes (L x S), W those with
several tokens in the call, M accesses, O accesses of them that are old.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from evaluation.engine.cache.trace import RouteTrace

LANES = 2048  # stepped together: enough to outweigh numpy's overhead, few enough for a core's cache
SEGMENT_CALLS = 64  # enough to outweigh sorting the stacks a segment starts with
OLD_TOGETHER = 64  # old accesses looked up in one go
MORE_CALLS = 2**30  # than a segment has
NEVER = -MORE_CALLS  # call of the last use of an expert that was not used yet; calls count from a segment's first
NO_AGE_IS_OLD = 2**31 - 1
Array = npt.NDArray[np.integer]


class Accesses(NamedTuple):
    """The accesses of a block of calls, in no particular order."""

    event: Array  # number of the event: call x layers + layer, both from 0
    phase: Array
    age: Array  # calls since the expert's last use, 65535 if more; 0: not used in this request before
    place: Array  # experts used more recently, before the event: of its layer, but of all layers where age > old_age


class _Block(NamedTuple):
    """Calls that follow each other; C of them in each of S segments."""

    bounds: Array  # the first token of every call, and the end of the last
    request_start_SC: Array  # the first call of the call's request, counted from the segment's first
    first_call_S: Array  # of each segment, counted from the trace's first
    start_SC: Array
    end_SC: Array


def accesses_by_block(trace: RouteTrace, *, old_age: int = NO_AGE_IS_OLD) -> Iterator[Accesses]:
    """All accesses of a trace, block by block in order; every request starts with empty stacks."""
    uses = _LastUses(trace)
    for block in _blocks(trace):
        lanes = _Lanes(*uses.at_segments(block))
        steps = [lanes.step(trace, block, call, old_age=old_age) for call in range(block.start_SC.shape[1])]
        yield Accesses(*(np.concatenate(parts) for parts in zip(*steps, strict=True)))


def _blocks(trace: RouteTrace) -> Iterator[_Block]:
    token = first_call = request_start = 0
    while token < trace.tokens:
        bounds = _call_bounds(trace, token, max(1, LANES // trace.layers) * SEGMENT_CALLS)
        calls = min(SEGMENT_CALLS, len(bounds) - 1)
        segments = (len(bounds) - 1) // calls
        bounds = bounds[: segments * calls + 1]
        call_SC = first_call + np.arange(segments * calls).reshape(segments, calls)
        request = trace.request_id[bounds[:-1]]
        begins = np.r_[token == 0 or trace.request_id[token - 1] != request[0], request[1:] != request[:-1]]
        starts = np.maximum.accumulate(np.where(begins, call_SC.ravel(), request_start))
        yield _Block(
            bounds=bounds,
            request_start_SC=starts.reshape(segments, calls) - call_SC[:, :1],
            first_call_S=call_SC[:, 0],
            start_SC=bounds[:-1].reshape(segments, calls),
            end_SC=bounds[1:].reshape(segments, calls),
        )
        token, first_call, request_start = int(bounds[-1]), first_call + segments * calls, int(starts[-1])


def _call_bounds(trace: RouteTrace, token: int, tokens: int) -> Array:
    """Where the calls that lie wholly in the next `tokens` tokens begin, and where the last ends; one call at least."""
    end = min(token + tokens, trace.tokens)
    bounds = token + np.r_[0, 1 + np.flatnonzero(np.diff(trace.call[token : end + 1]))]
    if end == trace.tokens:
        bounds = np.r_[bounds, end]
    if len(bounds) == 1:
        bounds = np.r_[bounds, np.searchsorted(trace.call, trace.call[token], side="right")]
    return bounds


class _LastUses:
    """When every expert was used last: by number through all choices of its layer, lighter before heavier, and by call."""

    def __init__(self, trace: RouteTrace) -> None:
        self._trace = trace
        self._number_LE = np.full((trace.layers, trace.num_experts), -1, np.int64)
        self._call_LE = np.full((trace.layers, trace.num_experts), NEVER, np.int64)

    def at_segments(self, block: _Block) -> tuple[Array, Array]:
        """[segment, layer, expert]: number and call of the last uses before each segment; goes on to the block's end."""
        trace, bounds = self._trace, block.bounds
        token_S = np.r_[block.start_SC[:, 0], bounds[-1]]
        number_SLE = np.stack([self._number_LE, *(_last_numbers(trace, a, b) for a, b in pairwise(token_S))])
        np.maximum.accumulate(number_SLE, axis=0, out=number_SLE)
        call_T = block.first_call_S[0] + np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
        token_SLE = number_SLE // trace.top_k - bounds[0]
        call_SLE = np.where(token_SLE < 0, self._call_LE, call_T[np.maximum(token_SLE, 0)])
        self._number_LE, self._call_LE = number_SLE[-1], call_SLE[-1]
        return number_SLE[:-1], np.maximum(call_SLE[:-1] - block.first_call_S[:, None, None], NEVER)


def _last_numbers(trace: RouteTrace, start: int, end: int) -> Array:
    """[layer, expert]: number of the last use in the tokens from `start` to `end`, -1 without one."""
    last_LE = np.full((trace.layers, trace.num_experts), -1, np.int64)
    layer_L1 = trace.num_experts * np.arange(trace.layers)[:, None]
    for first in range(start, end, SEGMENT_CALLS):
        token_T = np.arange(first, min(first + SEGMENT_CALLS, end))
        number_TK = token_T[:, None] * trace.top_k + np.arange(trace.top_k)[::-1]
        # Where an index comes several times, numpy leaves the value of the last one.
        last_LE.reshape(-1)[trace.expert_ids[token_T] + layer_L1] = number_TK[:, None]
    return last_LE


class _Event(NamedTuple):
    """What one call brings to all lanes."""

    ids_KN: Array  # of its first token, heaviest first: all there is in narrow lanes
    narrow_N: slice | Array  # the lanes with one token
    wide_N: Array  # the others, W of them
    number_WE: Array  # their experts' last uses in the call, -1: not used


class _Lanes:
    """The stacks of all lanes, and when their experts were used last."""

    def __init__(self, number_SLE: Array, call_SLE: Array) -> None:
        segments, self.layers, self.experts = number_SLE.shape
        self.lane_N = np.arange(segments * self.layers)
        self.last_NE = call_SLE.reshape(-1, self.experts).astype(np.int32)
        places = np.arange(self.experts, dtype=np.min_scalar_type(self.experts - 1))
        self.place_EN = np.empty((self.experts, len(self.lane_N)), places.dtype)
        order_NE = np.argsort(-number_SLE.reshape(-1, self.experts), axis=1)
        np.put_along_axis(self.place_EN, order_NE.T, places[:, None], axis=0)

    def step(self, trace: RouteTrace, block: _Block, call: int, *, old_age: int) -> Accesses:
        """Serve the `call`-th call of every segment."""
        event = self._event(trace, block.start_SC[:, call], block.end_SC[:, call])
        lane_M, expert_M = self._accessed(event)
        in_last_M = lane_M * self.experts + expert_M
        segment_N = self.lane_N // self.layers
        age_M = call - self.last_NE.ravel()[in_last_M]
        age_M *= age_M <= (call - block.request_start_SC[segment_N, call]).astype(np.int32)[lane_M]
        old = np.flatnonzero(age_M > old_age)
        used_O = self._used_elsewhere(lane_M[old], call - age_M[old], above=True)
        self.last_NE.reshape(-1)[in_last_M] = call
        used_O += self._used_elsewhere(lane_M[old], call - age_M[old] + 1, above=False)
        place_M = self._move(event, lane_M, expert_M).astype(np.int32)
        place_M[old] += used_O
        event_N = (segment_N * block.start_SC.shape[1] + call) * self.layers + self.lane_N % self.layers
        return Accesses(
            event=event_N.astype(np.int32)[lane_M],
            phase=trace.phase[block.start_SC[segment_N, call]].astype(np.uint8)[lane_M],
            age=np.minimum(age_M, 2**16 - 1).astype(np.uint16),
            place=place_M,
        )

    def _event(self, trace: RouteTrace, start_S: Array, end_S: Array) -> _Event:
        ids_KN = trace.expert_ids[start_S].reshape(-1, trace.top_k).T.astype(np.intp, order="C")
        wide_S = np.flatnonzero(end_S - start_S > 1)
        if not len(wide_S):
            return _Event(ids_KN, slice(None), wide_S, np.empty((0, self.experts), np.int64))
        wide_N = np.isin(self.lane_N // self.layers, wide_S)
        numbers = [_last_numbers(trace, start, end) for start, end in zip(start_S[wide_S], end_S[wide_S], strict=True)]
        return _Event(ids_KN, np.flatnonzero(~wide_N), np.flatnonzero(wide_N), np.concatenate(numbers))

    def _accessed(self, event: _Event) -> tuple[Array, Array]:
        """Lanes and experts of the event's accesses: first the narrow lanes', by K and lane."""
        ids_KN = event.ids_KN[:, event.narrow_N]
        lane_M = np.tile(self.lane_N[event.narrow_N], len(ids_KN))
        wide, expert = np.nonzero(event.number_WE >= 0)
        return np.concatenate([lane_M, event.wide_N[wide]]), np.concatenate([ids_KN.ravel(), expert])

    def _move(self, event: _Event, lane_M: Array, expert_M: Array) -> Array:
        """Bring the event's experts to the top of their stacks, the last of the event highest; return their places before."""
        place_EN, narrow_KN = self.place_EN, event.ids_KN[:, event.narrow_N]
        in_place_M = expert_M * len(self.lane_N) + lane_M
        place_M = place_EN.ravel()[in_place_M]
        order_EW = np.where(event.number_WE.T < 0, place_EN[:, event.wide_N], -1 - event.number_WE.T)
        passing_KN = np.zeros(event.ids_KN.shape, place_EN.dtype)
        passing_KN[:, event.narrow_N] = place_M[: narrow_KN.size].reshape(narrow_KN.shape)
        deeper_EN, passed_EN = np.empty(place_EN.shape, bool), np.zeros_like(place_EN)
        for passing_N in passing_KN:  # every expert sinks by as many as pass it
            np.less(place_EN, passing_N, out=deeper_EN)
            passed_EN += deeper_EN.view(np.uint8)
        place_EN += passed_EN
        top_K = np.arange(len(narrow_KN), dtype=place_EN.dtype)
        place_EN.reshape(-1)[in_place_M[: narrow_KN.size]] = np.repeat(top_K, narrow_KN.shape[1])
        place_EN[:, event.wide_N] = np.argsort(np.argsort(order_EW, axis=0), axis=0)
        return place_M

    def _used_elsewhere(self, lane_O: Array, since_O: Array, *, above: bool) -> Array:
        """Experts of the layers above (or below) each lane's, in its segment, that were used in call `since` or later."""
        last_SLE = self.last_NE.reshape(-1, self.layers, self.experts)
        layer_L, layer_O1 = np.arange(self.layers), lane_O[:, None] % self.layers
        counted_OL = layer_L > layer_O1 if above else layer_L < layer_O1
        since_OL1 = np.where(counted_OL, since_O[:, None], MORE_CALLS).astype(np.int32)[:, :, None]
        used_O = np.empty(len(lane_O), np.int32)
        for first in range(0, len(lane_O), OLD_TOGETHER):
            part = slice(first, first + OLD_TOGETHER)
            used_OLE = last_SLE[lane_O[part] // self.layers] >= since_OL1[part]
            np.add.reduce(used_OLE.view(np.uint8), axis=(1, 2), dtype=np.int32, out=used_O[part])
        return used_O
