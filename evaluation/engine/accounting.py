"""What is counted while the engine runs, and the figures made of it, under the names vLLM uses for speeds.

Numbers that were not measured are None, never 0. No torch: the replay counts with the same classes as the live engine.
"""

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from configs.load import UserError

PREFILL, DECODE = 0, 1
PHASES = ("prefill", "decode")
"""Names of the phases; their positions are the codes in traces and counters."""


@dataclass(slots=True)
class Counts:
    """Expert accesses of one layer and phase; an access is one distinct expert of one event."""

    accesses: int = 0
    misses: int = 0
    first_touches: int = 0  # misses on experts that had not been used since the cache was last empty

    @property
    def hit_rate(self) -> float | None:
        """Share of accesses that were resident before their event, 0 to 1; None without accesses."""
        return 1 - self.misses / self.accesses if self.accesses else None

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.accesses + other.accesses, self.misses + other.misses, self.first_touches + other.first_touches
        )


class CacheCounts:
    """`Counts` by phase and layer."""

    def __init__(self, layers: int) -> None:
        self.cells = [[Counts() for _ in range(layers)] for _ in PHASES]

    def add(self, phase: int, layer: int, accesses: int, misses: int, first_touches: int) -> None:
        """Count one event of `layer` (position among the MoE layers)."""
        cell = self.cells[phase][layer]
        cell.accesses += accesses
        cell.misses += misses
        cell.first_touches += first_touches

    def total(self, phase: int | None = None) -> Counts:
        """Sum over the layers, of one phase or of both."""
        rows = self.cells if phase is None else [self.cells[phase]]
        return sum((cell for row in rows for cell in row), Counts())

    def by_layer(self) -> list[Counts]:
        """Sum over the phases, one entry per MoE layer."""
        return [sum(column, Counts()) for column in zip(*self.cells, strict=True)]


class BusyClock:
    """Time in which at least one thread was inside; a context manager for each of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside, self._since, self._seconds = 0, 0.0, 0.0

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._since = time.perf_counter()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._seconds += time.perf_counter() - self._since

    def seconds(self) -> float:
        """Up to now."""
        with self._lock:
            return self._seconds + (time.perf_counter() - self._since if self._inside else 0.0)


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

    @property
    def bytes_read_per_token(self) -> float | None:
        """Expert bytes read by decode calls per decoded token; None when nothing was decoded."""
        return self.bytes_read_by_phase["decode"] / self.tokens["decode"] if self.tokens["decode"] else None


def engine_stats(counts: CacheCounts, reads: ReadCounts) -> EngineStats:
    """Freeze the live counters."""
    total, phases = counts.total(), [counts.total(phase) for phase in range(len(PHASES))]
    return EngineStats(
        accesses=total.accesses,
        hits=total.accesses - total.misses,
        misses=total.misses,
        first_touches=total.first_touches,
        hit_rate={name: part.hit_rate for name, part in zip(PHASES, phases, strict=True)},
        misses_by_phase={name: part.misses for name, part in zip(PHASES, phases, strict=True)},
        accesses_by_phase={name: part.accesses for name, part in zip(PHASES, phases, strict=True)},
        misses_by_layer=[layer.misses for layer in counts.by_layer()],
        bytes_read=sum(reads.bytes_read),
        bytes_read_by_phase=dict(zip(PHASES, reads.bytes_read, strict=True)),
        device_bytes_read=sum(reads.device_bytes_read),
        tokens=dict(zip(PHASES, reads.tokens, strict=True)),
        stall_seconds=dict(zip(PHASES, reads.stall_seconds, strict=True)),
        reading_seconds=dict(zip(PHASES, reads.reading_seconds, strict=True)),
        seconds=dict(zip(PHASES, reads.seconds, strict=True)),
        prefetched=reads.prefetched,
        prefetch_used=reads.prefetch_used,
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
        return [1e3 * (b - a) for a, b in zip(self.token_seconds, self.token_seconds[1:], strict=False)]

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


def peak_rss_bytes() -> int | None:
    """Peak resident memory of this process since it started (VmHWM); None where the kernel does not tell."""
    return _status_bytes("VmHWM")


def private_bytes() -> int:
    """Memory this process holds now that belongs to no file (RssAnon): what a memory budget counts.

    Raises:
        UserError: the kernel does not tell.
    """
    held_bytes = _status_bytes("RssAnon")
    if held_bytes is None:
        raise UserError(
            "this system does not tell how much memory a process holds (/proc/self/status); use expert_cache"
        )
    return held_bytes


def total_memory_bytes() -> int:
    """Physical memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _status_bytes(key: str) -> int | None:
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    for line in status.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return None
