"""A clock for tokens that also notes what the process had read by then; the same one for every side.

`read_bytes` of /proc/self/io is what the kernel fetched from the device for this process, faults of mapped files and
read-ahead included; `rchar` is what read calls returned, from the device or from the page cache, without mapped files.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil

from evaluation.engine.stats import Timing

COUNTERS = ("rchar", "read_bytes")


def process_io() -> dict[str, int]:
    """The `COUNTERS` of this process so far, of all its threads."""
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
        seconds, counters = time.perf_counter() - self.start, process_io()
        for number in ids:
            self.token_ids.append(number)
            self.token_seconds.append(seconds)
            self.token_io.append(counters)

    def result(self) -> "LegResult":
        """The figures of the request, which must have given a token."""
        assert self.token_ids, "a request without tokens"
        timing = Timing(self.token_seconds)
        decoded = len(self.token_ids) - 1
        first, last = self.token_io[0], self.token_io[-1]
        return LegResult(
            token_ids=self.token_ids,
            ttft_ms=timing.ttft_ms,
            tpot_ms=timing.tpot_ms,
            itl_ms=timing.itl_ms,
            output_throughput=timing.output_throughput,
            prefill_io={name: first[name] - self.start_io[name] for name in COUNTERS},
            decode_io={name: last[name] - first[name] for name in COUNTERS},
            bytes_read_per_token=(last["read_bytes"] - first["read_bytes"]) / decoded if decoded else None,
        )


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
