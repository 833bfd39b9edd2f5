"""Who gets the memory that experts and kept keys and values share: moved while requests run, the total stays.

Every few requests both sides are asked what the last requests would have cost at every size (WiSP's marginal values,
arXiv 2606.21868, taken over the whole curves, because the value of kept blocks is a cliff: conversations that take turns
find nothing until all of them fit). Experts: LRU misses of the recorded routing at every number of slots, times the time
that a miss made computing wait. Blocks: those that would not have been found, times the time of computing one. Both times are
measured as the requests run. Memory moves when that would have saved more than a small share of the whole time.
"""

from collections import deque

import numpy as np
import numpy.typing as npt

from evaluation.engine.cache.counts import PHASES
from evaluation.engine.cache.curve import lru_curve
from evaluation.engine.engine import Engine
from evaluation.engine.sessions.conversations import Conversations
from evaluation.engine.sessions.workload import Rates
from evaluation.engine.stats import EngineStats

EVERY = 4
"""Requests between two decisions."""
ROUTING_REQUESTS, BLOCK_REQUESTS = 8, 64
"""How far back each side looks: routing hardly changes its kind; a conversation comes back after many others."""
WORTH = 0.02
"""Memory moves for this share of the time of a request, or more."""
Array = npt.NDArray[np.floating]


class MemoryController:
    """Divides what `engine.division` leaves to experts and to `chat.kept`; call `request_done` after every request."""

    def __init__(self, engine: Engine, chat: Conversations) -> None:
        assert engine.division is not None, "without a memory budget there is nothing to divide"
        self._engine, self._chat, self._division = engine, chat, engine.division
        self._distances: deque[list[int]] = deque(maxlen=BLOCK_REQUESTS)
        self._requests = 0
        self._before: EngineStats = engine.stats()
        self._times = _Times()
        chat.watch = self._distances.append
        engine.record_routing()

    def request_done(self) -> None:
        """Take note of a request; every few of them, decide."""
        self._requests += 1
        self._engine.begin_request_in_trace()
        if self._requests % EVERY == 0:
            now = self._engine.stats()
            self._times.add(self._before, now, requests=EVERY)
            self._before = now
            self.decide()

    def decide(self) -> None:
        """Give kept blocks the capacity that would have cost least, if that is worth moving memory.

        They lose none of it before `BLOCK_REQUESTS` have shown what comes back: at first nothing does.
        """
        seconds = self.seconds_by_blocks()
        if seconds is None or self._chat.kept.block_bytes is None:
            return
        block_bytes = self._chat.kept.block_bytes
        now = min(self._chat.kept.capacity_bytes // block_bytes, len(seconds) - 1)
        least = 0 if len(self._distances) == BLOCK_REQUESTS else now
        best = least + int(seconds[least:].argmin())
        if seconds[now] - seconds[best] > WORTH * self._times.request_seconds:
            self._chat.kept.resize(best * block_bytes)

    def seconds_by_blocks(self) -> Array | None:
        """What a request would have waited for experts and computed again, for every capacity in blocks, 0 and up.

        None before there is anything to go by.
        """
        trace = self._engine.recent_routing(ROUTING_REQUESTS)
        block_bytes = self._chat.kept.block_bytes
        if trace is None or block_bytes is None or not self._distances:
            return None
        capacities = np.arange(self._division.shared_bytes // block_bytes + 1)
        slots = [self._division.slots_beside(int(blocks) * block_bytes) for blocks in capacities]
        curve = lru_curve(trace.as_one_request(), cache_scope=self._engine.cache.scope)  # the engine's cache stays warm
        misses = curve.misses.sum(axis=1)[:, slots] / len(np.unique(trace.request_id))
        distances = np.array([d for request in self._distances for d in request if d], dtype=np.int64)
        lacking = len(distances) - np.searchsorted(np.sort(distances), capacities, side="right")
        again_tokens = lacking * self._chat.block_tokens / len(self._distances)
        rates = Rates((self._times.prompt_token_seconds, 0.0), self._times.miss_seconds.tolist())
        return rates.seconds(tokens=(again_tokens, 0), misses=misses)


class _Times:
    """Measured times, the last decisions' counting most."""

    NAMES = ("stall_seconds", "misses_by_phase", "seconds", "tokens")

    def __init__(self) -> None:
        self._sums = np.zeros((len(self.NAMES), len(PHASES)))
        self._requests = 0.0

    def add(self, before: EngineStats, now: EngineStats, *, requests: int) -> None:
        """What happened between two readings of the counters."""
        past, present = ([list(getattr(stats, name).values()) for name in self.NAMES] for stats in (before, now))
        self._sums = 0.5 * self._sums + np.subtract(present, past)
        self._requests = 0.5 * self._requests + requests

    @property
    def miss_seconds(self) -> Array:
        """By phase: what computing waits for a miss."""
        return self._sums[0] / np.maximum(1, self._sums[1])

    @property
    def prompt_token_seconds(self) -> float:
        return float(self._sums[2, 0] / max(1, self._sums[3, 0]))

    @property
    def request_seconds(self) -> float:
        return float(self._sums[2].sum() / max(1, self._requests))
