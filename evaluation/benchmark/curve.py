"""The speed of `lru_curve` in expert accesses per second, on made-up traces shaped like those of real models.

The routers are made up: every layer has experts it likes more (normal log-odds), and what it likes drifts from token to
token, so that neighbouring tokens share experts about as often as in trained models. Time goes with the shape and with
how old uses are, not with what the experts are.
"""

import time
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import numpy as np
from rich.console import Console

from configs.checks import at_least
from evaluation.benchmark.tables import table
from evaluation.engine.cache.counts import DECODE
from evaluation.engine.cache.curve import lru_curve
from evaluation.engine.cache.pool import SCOPES
from evaluation.engine.cache.reuse import reuse_rate_per_layer
from evaluation.engine.cache.trace import RouteTrace

REQUEST_TOKENS = 512
DRIFT = 0.3  # correlation of a router's taste from one token to the next


class TraceShape(NamedTuple):
    layers: int
    experts: int
    top_k: int


SHAPES = {
    "OLMoE-1B-7B": TraceShape(16, 64, 8),
    "DeepSeek-V2-Lite": TraceShape(26, 64, 6),
    "Qwen3-30B-A3B": TraceShape(48, 128, 8),
}


@dataclass(frozen=True, kw_only=True)
class CurveBenchmark:
    """Measure the all-sizes LRU curve on made-up traces with the shapes of real models.

    example:
      remoe bench curve --accesses 2000000 --repeats 7
    """

    accesses: int = 1_000_000  # size of each trace
    repeats: int = 5  # runs of which the median is shown

    def __post_init__(self) -> None:
        at_least(self, accesses=1, repeats=1)


def benchmark(options: CurveBenchmark) -> None:
    """Measure both scopes on every shape and print a table."""
    rows = []
    for name, shape in SHAPES.items():
        trace = drifting_trace(shape, tokens=max(1, options.accesses // (shape.layers * shape.top_k)), seed=0)
        reuse = f"{reuse_rate_per_layer(trace).mean():.2f}"
        for scope in SCOPES:
            rates = accesses_per_second(trace, scope, repeats=options.repeats)
            rows.append((name, f"{trace.tokens:,}", reuse, scope, *(f"{rate / 1e6:.1f}" for rate in rates)))
    title = f"all-sizes LRU curve, million accesses per second (median of {options.repeats})"
    Console().print(table(title, "shape|>tokens|>EOR|scope|>by wall time|>by CPU time", rows))


def accesses_per_second(trace: RouteTrace, cache_scope: str, *, repeats: int) -> tuple[float, float]:
    """The median speed of `lru_curve`, by wall time and by CPU time of this process."""
    seconds = []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        lru_curve(trace, cache_scope=cache_scope)
        seconds.append((time.perf_counter() - wall, time.process_time() - cpu))
    wall_seconds, cpu_seconds = (median(each) for each in zip(*seconds, strict=True))
    return trace.expert_ids.size / wall_seconds, trace.expert_ids.size / cpu_seconds


def drifting_trace(shape: TraceShape, *, tokens: int, seed: int) -> RouteTrace:
    """Single-token calls, in requests of `REQUEST_TOKENS`."""
    random = np.random.default_rng(seed)
    liked_LE, taste_LE = random.standard_normal((2, shape.layers, shape.experts))
    ids_TLK = np.empty((tokens, shape.layers, shape.top_k), np.uint8)
    for token in range(tokens):
        taste_LE = DRIFT * taste_LE + np.sqrt(1 - DRIFT**2) * random.standard_normal(taste_LE.shape)
        ids_TLK[token] = np.argsort(-(liked_LE + taste_LE), axis=1)[:, : shape.top_k]
    number_T, phase_T, layers = np.arange(tokens), np.full(tokens, DECODE), tuple(range(shape.layers))
    return RouteTrace(ids_TLK, phase_T, number_T // REQUEST_TOKENS, number_T, shape.experts, layers)
