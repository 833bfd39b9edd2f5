"""The exact LRU miss-ratio curve of a routing trace, at every cache size, in one pass.

Stack distances (Mattson et al., IBM Systems Journal 9:2, 1970) with the events of `cache.py` in place of accesses: all
lookups of an event are against the stack as it was before the event. An access at distance d (its expert's place in
that stack, from 1) hits in every cache of at least d slots. numpy only; memory does not grow with the trace.
Axes: C calls of a chunk, T tokens, L MoE layers, E experts of a layer, K experts chosen, N accesses, A ages in calls.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from configs.load import UserError
from evaluation.engine.accounting import PHASES
from evaluation.engine.cache import SCOPES
from evaluation.engine.route_trace import RouteTrace

CHUNK_CELLS = 1 << 16  # calls x layers x experts looked at together: what fits a core's cache
NEAR_CALLS = 128  # reuse within so many calls is looked up in a table, reuse after more is counted
Array = npt.NDArray[np.integer]


@dataclass(frozen=True, eq=False)
class LruCurve:
    """What an LRU cache of every size misses; every request starts cold.

    Axes are phase (as in `PHASES`) and pool: one per layer for `per_layer`, a single one for `global`.
    """

    cache_scope: str
    accesses: Array  # [phase, pool]
    first_touches: Array  # [phase, pool]; misses at every size
    distances: Array  # [phase, pool, d]: accesses at stack distance d

    @property
    def misses(self) -> Array:
        """[phase, pool, slots] for 0, 1, ... slots of a pool, up to all its experts."""
        misses: Array = self.accesses[..., None] - np.cumsum(self.distances, axis=-1)
        return misses


def lru_curve(trace: RouteTrace, *, cache_scope: str) -> LruCurve:
    """The curve of a trace, for one pool per layer (`per_layer`) or one for all layers (`global`).

    Raises:
        UserError: unknown scope.
    """
    if cache_scope not in SCOPES:
        raise UserError(f"unknown cache scope {cache_scope!r}; known: {', '.join(SCOPES)}")
    one_pool = cache_scope == "global"
    pools = 1 if one_pool else trace.layers
    accesses, first_touches = np.zeros((2, len(PHASES), pools), np.int64)
    distances = np.zeros((len(PHASES), pools, 1 + trace.num_experts * trace.layers // pools), np.int64)
    for chunk in _chunks(trace):
        again = chunk.last_N >= chunk.request_start_C[chunk.call_N]
        pool_N = chunk.phase_C[chunk.call_N] * pools + (0 if one_pool else chunk.layer_N)
        distance_N = _places_in_layer(chunk, again)
        if one_pool:
            distance_N += _used_in_other_layers(chunk, again)
        _count(accesses, pool_N)
        _count(first_touches, pool_N[~again])
        _count(distances, pool_N[again] * distances.shape[-1] + distance_N)
    return LruCurve(cache_scope, accesses, first_touches, distances)


def _count(into: Array, index_N: Array) -> None:
    into += np.bincount(index_N, minlength=into.size).reshape(into.shape)


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Some calls of a trace and every expert's last use around them.

    A use is numbered through the trace by token, and inside a token by rising router weight, so the numbers of a
    layer's uses say which was more recent. -1: not used yet.
    """

    last_CLE: Array  # last use before each call, and after the last one: C + 1 entries
    last_call_CLE: Array  # the call of that use
    first_call: int
    phase_C: Array
    request_start_C: Array  # the first use number of the call's request
    call_N: Array  # accesses: position of the call in the chunk
    layer_N: Array
    last_N: Array  # last use of the accessed expert before this one
    last_call_N: Array


def _chunks(trace: RouteTrace) -> Iterator[_Chunk]:
    start_of_call = np.flatnonzero(np.r_[True, np.diff(trace.call) != 0])
    end_of_call = np.r_[start_of_call[1:], trace.tokens]
    call_of_token = np.repeat(np.arange(len(start_of_call)), end_of_call - start_of_call)
    request_starts = np.flatnonzero(np.r_[True, np.diff(trace.request_id) != 0]) * trace.top_k
    number_type = np.int32 if trace.tokens * trace.top_k < 2**31 else np.int64
    last_LE = np.full((trace.layers, trace.num_experts), -1, number_type)
    cells = trace.layers * trace.num_experts
    at = 0
    while at < len(start_of_call):
        tokens = max(1, CHUNK_CELLS // cells)
        end = max(at + 1, int(np.searchsorted(end_of_call, start_of_call[at] + tokens, side="right")))
        calls = slice(at, end)
        used_CLE = _uses(trace, start_of_call[calls], int(end_of_call[end - 1]), number_type)
        last_CLE = np.maximum.accumulate(np.concatenate([last_LE[None], used_CLE]), axis=0)
        last_LE = last_CLE[-1]
        last_call_CLE = np.where(last_CLE < 0, -1, call_of_token[last_CLE // trace.top_k])
        accessed = np.nonzero(used_CLE >= 0)
        starts = start_of_call[calls]
        request = np.searchsorted(request_starts, starts * trace.top_k, side="right") - 1
        yield _Chunk(
            last_CLE=last_CLE, last_call_CLE=last_call_CLE, first_call=at, phase_C=trace.phase[starts].astype(np.int64),
            request_start_C=request_starts[request], call_N=accessed[0], layer_N=accessed[1],
            last_N=last_CLE[accessed], last_call_N=last_call_CLE[accessed],
        )  # fmt: skip
        at = end


def _uses(trace: RouteTrace, starts: Array, end: int, number_type: type[np.integer]) -> Array:
    """[call, layer, expert]: the number of the expert's last use in the call, -1 if it was not used."""
    tokens, top_k = slice(int(starts[0]), end), trace.top_k
    numbers_TK = np.arange(tokens.start, end)[:, None] * top_k + np.arange(top_k)[::-1]
    ids_TLK = trace.expert_ids[tokens].astype(np.int64)
    used_TLE = np.full((len(ids_TLK), trace.layers, trace.num_experts), -1, number_type)
    np.put_along_axis(used_TLE, ids_TLK, np.broadcast_to(numbers_TK[:, None], ids_TLK.shape), axis=2)
    return used_TLE if len(starts) == len(used_TLE) else np.maximum.reduceat(used_TLE, starts - starts[0], axis=0)


def _places_in_layer(chunk: _Chunk, which_N: npt.NDArray[np.bool_]) -> Array:
    """1 + the experts of the same layer that were used more recently."""
    rows_NE = chunk.last_CLE[chunk.call_N[which_N], chunk.layer_N[which_N]]
    later_NE = rows_NE > chunk.last_N[which_N, None]
    places_N: Array = 1 + np.add.reduce(later_NE.view(np.uint8), axis=1, dtype=np.uint16).astype(np.int64)
    return places_N


def _used_in_other_layers(chunk: _Chunk, which_N: npt.NDArray[np.bool_]) -> Array:
    """Experts of other layers used since: after it in the call of the last use, in the calls between, before it in this."""
    call_N, layer_N, since_N = chunk.call_N[which_N], chunk.layer_N[which_N], chunk.last_call_N[which_N]
    age_N = chunk.first_call + call_N - since_N
    near_N = age_N <= NEAR_CALLS
    used_N = np.empty(len(age_N), np.int64)
    table_CLA = _used_within(chunk)
    used_N[near_N] = table_CLA[call_N[near_N], layer_N[near_N], age_N[near_N]]
    for n in np.flatnonzero(~near_N):
        call, layer, since = call_N[n], layer_N[n], since_N[n]
        used_N[n] = (chunk.last_call_CLE[call, layer + 1 :] >= since).sum()
        used_N[n] += (chunk.last_call_CLE[call + 1, :layer] > since).sum()
    return used_N


def _used_within(chunk: _Chunk) -> Array:
    """[call, layer, age]: what `_used_in_other_layers` asks for, for every age up to `NEAR_CALLS`."""
    calls, layers, _ = chunk.last_call_CLE.shape
    age_CLE = chunk.first_call + np.arange(calls)[:, None, None] - chunk.last_call_CLE
    row_CL1 = np.arange(calls * layers).reshape(calls, layers, 1) * (NEAR_CALLS + 2)
    index = row_CL1 + np.minimum(age_CLE, NEAR_CALLS + 1)
    within_CLA = np.bincount(index.ravel(), minlength=calls * layers * (NEAR_CALLS + 2))
    within_CLA = within_CLA.reshape(calls, layers, -1).cumsum(axis=2)
    up_to_CLA = within_CLA.cumsum(axis=1)
    later_CLA = up_to_CLA[:-1, -1:] - up_to_CLA[:-1]
    earlier_CLA = up_to_CLA[1:] - within_CLA[1:]
    used: Array = later_CLA + earlier_CLA
    return used
