"""The exact LRU miss-ratio curve of a routing trace, at every cache size, in one pass.

Stack distances (Mattson et al., IBM Systems Journal 9:2, 1970) with the events of `pool.py` in place of accesses: all
lookups of an event are against the stack as it was before the event. An access at distance d (its expert's place in
that stack, from 1) hits in every cache of at least d slots. With one pool per layer the stack is the layer's
(`stacks.py`); with one pool for all, the experts of other layers used since the last use are added to the place in it.
numpy only; memory does not grow with the trace. Axes: M accesses of a block of calls.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from configs.load import UserError
from evaluation.engine.cache.counts import PHASES
from evaluation.engine.cache.pool import SCOPES
from evaluation.engine.cache.stacks import Accesses, accesses_by_block
from evaluation.engine.cache.trace import RouteTrace

OLD_TURNOVERS, OLDEST = 16, 1024
"""Ages are counted together from 16 times as many calls as it takes to use every expert once, and from 1024 at the latest."""
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
        return self.accesses[..., None] - np.cumsum(self.distances, axis=-1)


def lru_curve(trace: RouteTrace, *, cache_scope: str) -> LruCurve:
    """The curve of a trace, for one pool per layer (`per_layer`) or one for all (`global`); else `UserError`."""
    if cache_scope not in SCOPES:
        raise UserError(f"unknown cache scope {cache_scope!r}; known: {', '.join(SCOPES)}")
    pools = trace.layers if cache_scope == "per_layer" else 1
    bins = trace.num_experts * trace.layers // pools + 2  # 0 slots, every distance, and first touches
    counts = np.zeros((len(PHASES), pools, bins), np.int64)
    windows = None if cache_scope == "per_layer" else _Windows(trace)
    blocks = accesses_by_block(trace) if windows is None else accesses_by_block(trace, old_age=windows.old_age)
    for accesses in _one_ahead(blocks):
        place_M = accesses.place if windows is None else accesses.place + windows.used_elsewhere(accesses)
        bin_M = np.where(accesses.age == 0, bins - 1, place_M + 1)
        pool_M = accesses.phase * np.int64(pools) + accesses.event % trace.layers % pools
        counts += np.bincount(pool_M * bins + bin_M, minlength=counts.size).reshape(counts.shape)
    return LruCurve(cache_scope, counts.sum(axis=-1), counts[..., -1], counts[..., :-1])


def _one_ahead(blocks: Iterator[Accesses]) -> Iterator[Accesses]:
    """Each block, while a thread moves the stacks for the next one."""
    with ThreadPoolExecutor(1) as stacks:
        coming = stacks.submit(next, blocks, None)
        while (accesses := coming.result()) is not None:
            coming = stacks.submit(next, blocks, None)
            yield accesses


class _Windows:
    """Counts the experts of other layers that were used between an expert's last use and now, block by block.

    Events are numbered call by call, layer by layer, so an age of n calls is a window of n x layers events. An access in
    the window is its expert's first there if its own age reaches back to the window's start or beyond: in the window's
    n-th call, if it is n or more.
    """

    def __init__(self, trace: RouteTrace) -> None:
        self.layers = trace.layers
        self.old_age = min(OLD_TURNOVERS * -(-trace.num_experts // trace.top_k), OLDEST)
        self._calls = 0  # calls before the next block that windows can reach into, and their accesses
        self._event_M = np.empty(0, np.int32)
        self._age_M = np.empty(0, np.uint16)

    def used_elsewhere(self, accesses: Accesses) -> Array:
        """For every access of the next block; 0 for first touches and above `old_age`."""
        event_M = np.concatenate([self._event_M, accesses.event + np.int32(self._calls * self.layers)])
        age_M = np.concatenate([self._age_M, accesses.age])
        calls = int(event_M.max()) // self.layers + 1
        used_M = _used_elsewhere(event_M, age_M, layers=self.layers, calls=calls, old_age=self.old_age)
        self._calls = min(calls, self.old_age)
        passed = np.int32((calls - self._calls) * self.layers)
        again = event_M >= passed
        self._event_M, self._age_M = event_M[again] - passed, age_M[again]
        return used_M[-len(accesses.event) :]


def _used_elsewhere(event_M: Array, age_M: Array, *, layers: int, calls: int, old_age: int) -> Array:
    """See `_Windows`; what comes out for accesses whose window begins before event 0 means nothing."""
    by_age = np.argsort(age_M, kind="stable")
    end_of_age = np.cumsum(np.bincount(age_M, minlength=old_age + 1))
    event_M = event_M[by_age].astype(np.intp)
    events = calls * layers
    counted = np.bincount(event_M, minlength=events).astype(np.int32)  # accesses of age n and more, by event
    before = np.zeros(events + 1, np.int32)  # the same of all events before
    used = np.zeros(events, np.int32)  # by event: experts of other layers used in the n calls after it
    used_M = np.zeros(len(event_M), np.int32)
    for age in range(1, min(old_age, calls - 1) + 1):
        np.cumsum(counted, out=before[1:])
        windows = events - age * layers
        used[:windows] += before[age * layers : events]
        used[:windows] -= before[(age - 1) * layers + 1 :][:windows]
        of_age = slice(end_of_age[age - 1], end_of_age[age])
        used_M[of_age] = used[event_M[of_age] - age * layers]
        np.subtract.at(counted, event_M[of_age], np.int32(1))
    unsorted_M = np.empty_like(used_M)
    unsorted_M[by_age] = used_M
    return unsorted_M


def curve_json(trace: RouteTrace, curve: LruCurve) -> dict[str, Any]:
    """Misses with 0, 1, ... slots of each layer (`per_layer`) or of the pool (`global`), whole, by phase and by layer.

    Below `smallest_slots` no engine runs; those entries only complete the curve.
    """
    return {
        "smallest_slots": trace.top_k,
        **_totals(curve, ...),
        **{phase: _totals(curve, code) for code, phase in enumerate(PHASES)},
        "per_layer": None
        if curve.cache_scope == "global"
        else [{"layer": name, **_totals(curve, np.s_[:, layer])} for layer, name in enumerate(trace.layer_ids)],
    }


def _totals(curve: LruCurve, part: Any) -> dict[str, Any]:
    """Sums over phases and pools, or over a part of them."""
    misses = curve.misses[part]
    return {
        "accesses": int(curve.accesses[part].sum()),
        "first_touches": int(curve.first_touches[part].sum()),
        "misses": misses.reshape(-1, misses.shape[-1]).sum(axis=0).tolist(),
    }
