"""What is counted while the engine runs, and the figures made of it, under the names vLLM uses for speeds.

Numbers that were not measured are None, never 0. No torch: the replay counts with the same classes as the live engine.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean
from typing import Any

from evaluation.engine.cache.counts import PHASES, CacheCounts


@dataclass
class ReadCounts:
    """What a live engine moved, by phase (see `PHASES`)."""

    bytes_read: list[int] = field(default_factory=lambda: [0, 0])  # of experts
    device_bytes_read: list[int] = field(default_factory=lambda: [0, 0])  # of the pages they lie in
    stall_seconds: list[float] = field(default_factory=lambda: [0.0, 0.0])
    reading_seconds: list[float] = field(default_factory=lambda: [0.0, 0.0])
    tokens: list[int] = field(default_factory=lambda: [0, 0])  # rows the model computed, padding included
    seconds: list[float] = field(default_factory=lambda: [0.0, 0.0])  # of the decoder's calls
    prefetched: int = 0  # experts that were read ahead
    prefetch_used: int = 0  # those of them that were missed then
    ahead_calls: int = 0  # decode calls in which the next layers' routers were asked
    swapped: int = 0  # experts of a router's own choice that levers replaced or dropped while decoding
    lost_weight: float = 0.0  # mixing weight that they took with them, less that of those in their place

    def clear(self) -> None:
        """Set all of them to zero."""
        vars(self).update(vars(ReadCounts()))


@dataclass(frozen=True)
class EngineStats:
    """A copy of the live counters: since `load` or the last `reset_stats`. Dictionaries have the keys of `PHASES`."""

    accesses: int
    hits: int
    misses: int
    first_touches: int
    hit_rate: dict[str, float | None]
    misses_by_phase: dict[str, int]
    accesses_by_phase: dict[str, int]
    misses_by_layer: list[int]
    bytes_read: int
    bytes_read_by_phase: dict[str, int]
    device_bytes_read: int  # with the rest of the pages that experts begin and end in
    tokens: dict[str, int]
    stall_seconds: dict[str, float]  # time in which computing waited for expert reads
    reading_seconds: dict[str, float]  # time of the decoder's calls in which something was being read
    seconds: dict[str, float]  # time of the decoder's calls, waiting included
    prefetched: int = 0  # experts that were read ahead by the next layer's router; their bytes count as decode's
    prefetch_used: int = 0  # those of them that were missed then
    ahead_calls: int = 0  # decode calls in which the next layers' routers were asked
    swapped: int = 0  # experts of a router's own choice that levers replaced or dropped while decoding
    lost_weight: float = 0.0  # mixing weight that they took with them, less that of those in their place

    @property
    def bytes_read_per_token(self) -> float | None:
        """Expert bytes read by decode calls per decoded token; None when nothing was decoded."""
        return self.bytes_read_by_phase["decode"] / self.tokens["decode"] if self.tokens["decode"] else None


def engine_stats(counts: CacheCounts, reads: ReadCounts) -> EngineStats:
    """Freeze the live counters."""
    total, phases = counts.total(), {name: counts.total(code) for code, name in enumerate(PHASES)}
    names = ("tokens", "stall_seconds", "reading_seconds", "seconds")
    measured: dict[str, Any] = {name: dict(zip(PHASES, getattr(reads, name), strict=True)) for name in names}
    return EngineStats(
        accesses=total.accesses,
        hits=total.accesses - total.misses,
        misses=total.misses,
        first_touches=total.first_touches,
        hit_rate={name: part.hit_rate for name, part in phases.items()},
        misses_by_phase={name: part.misses for name, part in phases.items()},
        accesses_by_phase={name: part.accesses for name, part in phases.items()},
        misses_by_layer=[layer.misses for layer in counts.by_layer()],
        bytes_read=sum(reads.bytes_read),
        bytes_read_by_phase=dict(zip(PHASES, reads.bytes_read, strict=True)),
        device_bytes_read=sum(reads.device_bytes_read),
        **measured,
        prefetched=reads.prefetched,
        prefetch_used=reads.prefetch_used,
        ahead_calls=reads.ahead_calls,
        swapped=reads.swapped,
        lost_weight=reads.lost_weight,
    )


@dataclass(frozen=True)
class Timing:
    """When the tokens of one request came, in seconds after the request was made, one entry per token."""

    token_seconds: Sequence[float]

    @property
    def ttft_ms(self) -> float | None:
        """Time to the first token."""
        return 1e3 * self.token_seconds[0] if self.token_seconds else None

    @property
    def itl_ms(self) -> list[float]:
        """Inter-token latencies: one fewer than there are tokens."""
        return [1e3 * (b - a) for a, b in pairwise(self.token_seconds)]

    @property
    def tpot_ms(self) -> float | None:
        """Time per output token after the first; None when there was only one."""
        return fmean(self.itl_ms) if self.itl_ms else None

    @property
    def output_throughput(self) -> float | None:
        """Output tokens per second of the whole request."""
        if not self.token_seconds or self.token_seconds[-1] <= 0:
            return None
        return len(self.token_seconds) / self.token_seconds[-1]
