"""A side that is loaded and serves legs, and the clock for its tokens, which also notes what the process had read.

`read_bytes` of /proc/self/io is what the kernel fetched from the device for this process, faults of mapped files and
read-ahead included; `rchar` is what read calls returned, from the device or from the page cache, without mapped files.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from evaluation.benchmark.order import Leg
from evaluation.engine.stats import Timing


@dataclass
class LegResult:
    """One request of one side. `bytes_read_per_token` is `read_bytes` of the decode part; `engine` is ours alone."""

    token_ids: list[int]
    ttft_ms: float | None
    tpot_ms: float | None
    itl_ms: list[float]
    output_throughput: float | None
    prefill_io: dict[str, int]
    decode_io: dict[str, int]
    bytes_read_per_token: float | None
    engine: dict[str, Any] | None = None  # hit rates, misses, EOR: what only a paged engine knows


@dataclass
class Serving:
    """A loaded side."""

    request: Callable[[Leg], LegResult]  # serves one leg
    files: list[Path]  # the weights it reads, for the page cache to be dropped
    settings: dict[str, Any]  # in words or numbers, for the report
    begin_cold: Callable[[], None] = lambda: None  # forgets what the side itself has cached, not the page cache


def process_io() -> dict[str, int]:
    """The counters of this process so far, of all its threads."""
    counters = psutil.Process().io_counters()
    return {"rchar": counters.read_chars, "read_bytes": counters.read_bytes}


@dataclass
class Meter:
    """Notes time and bytes as tokens come; a request starts when its meter is made."""

    start: float = field(default_factory=time.perf_counter)
    start_io: dict[str, int] = field(default_factory=process_io)
    token_ids: list[int] = field(default_factory=list)
    token_seconds: list[float] = field(default_factory=list)
    token_io: list[dict[str, int]] = field(default_factory=list)

    def tokens(self, ids: Sequence[int]) -> None:
        """Note that these tokens came now."""
        self.token_ids += ids
        self.token_seconds += [time.perf_counter() - self.start] * len(ids)
        self.token_io += [process_io()] * len(ids)

    def result(self) -> LegResult:
        """The figures of the request, which must have given a token."""
        assert self.token_ids, "a request without tokens"
        timing, decoded = Timing(self.token_seconds), len(self.token_ids) - 1
        steps = pairwise([self.start_io, self.token_io[0], self.token_io[-1]])
        prefill_io, decode_io = ({name: after[name] - before[name] for name in after} for before, after in steps)
        return LegResult(
            self.token_ids, timing.ttft_ms, timing.tpot_ms, timing.itl_ms, timing.output_throughput, prefill_io, decode_io,
            bytes_read_per_token=decode_io["read_bytes"] / decoded if decoded else None,
        )  # fmt: skip
