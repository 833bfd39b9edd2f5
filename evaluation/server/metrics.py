"""The figures of `/metrics`, in Prometheus' text format: counters, gauges and histograms, no rates: Prometheus makes them.

The hit rate of decoding over a minute is
`1 - rate(remoe_expert_misses_total{phase="decode"}[1m]) / rate(remoe_expert_accesses_total{phase="decode"}[1m])`.
"""

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from evaluation.engine.cache.counts import PHASES
from evaluation.engine.engine import Engine
from evaluation.server.work import Done

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
"""Buckets for whole requests and first tokens: a prompt may touch every expert of a large model."""
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5)


class Metrics:
    """All counters of one server, in a registry of their own."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCounters(engine))
        self.requests = self._counter("requests", "HTTP answers; 499: the client left first", "endpoint", "status")
        self.ttft_seconds = self._histogram("time_to_first_token_seconds", "from arrival, waiting included", SECONDS)
        self.tpot_seconds = self._histogram("time_per_output_token_seconds", "mean of a request", TOKEN_SECONDS)
        self.itl_seconds = self._histogram("inter_token_latency_seconds", "between two tokens", TOKEN_SECONDS)
        self.queue_seconds = self._histogram("request_queue_seconds", "from arrival to being served", SECONDS)
        self._prompt_tokens = self._counter("prompt_tokens", "of requests that were served to their end")
        self._cached_tokens = self._counter("prompt_tokens_cached", "of these, found in the prefix cache")
        self._generation_tokens = self._counter("generation_tokens", "of requests that were served to their end")

    def request_done(self, done: Done, *, tpot_seconds: float | None) -> None:
        """Count a request that was served to its end."""
        self._prompt_tokens.inc(done.prompt_tokens)
        self._cached_tokens.inc(done.cached_tokens)
        self._generation_tokens.inc(done.completion_tokens)
        if tpot_seconds is not None:
            self.tpot_seconds.observe(tpot_seconds)

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(f"remoe_{name}", meaning, labels, registry=self.registry)

    def _histogram(self, name: str, meaning: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"remoe_{name}", meaning, registry=self.registry, buckets=buckets)


class _EngineCounters(Collector):
    """The engine's own counters, read when they are asked for."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Any]:
        stats = self._engine.stats()
        for name, meaning, by_phase in (
            ("expert_accesses", "experts that layers asked for", stats.accesses_by_phase),
            ("expert_misses", "of these, not resident", stats.misses_by_phase),
            ("expert_bytes_read", "bytes of experts read", stats.bytes_read_by_phase),
            ("expert_stall_seconds", "time that computing waited for experts", stats.stall_seconds),
            ("model_tokens", "token rows computed, padding included", stats.tokens),
        ):
            family = CounterMetricFamily(f"remoe_{name}", meaning, labels=["phase"])
            for phase in PHASES:
                family.add_metric([phase], by_phase[phase])
            yield family
        if self._engine.kept is not None:
            yield GaugeMetricFamily("remoe_prefix_cache_bytes", "kept keys and values", self._engine.kept.held_bytes)
            yield GaugeMetricFamily("remoe_prefix_cache_capacity_bytes", "at most", self._engine.kept.capacity_bytes)
        yield GaugeMetricFamily("remoe_expert_cache_bytes", "memory of all slots", self._engine.pool_bytes)
        yield GaugeMetricFamily("remoe_expert_cache_slots", "experts that fit", self._engine.cache.total_slots)
