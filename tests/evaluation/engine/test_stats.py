"""Figures made of counters and times: what was not measured is None."""

import pytest

from evaluation.engine.cache.counts import DECODE, PREFILL, CacheCounts, Counts
from evaluation.engine.memory.process import peak_rss_bytes
from evaluation.engine.stats import ReadCounts, Timing, engine_stats


def test_speeds_follow_their_definitions() -> None:
    timing = Timing([0.5, 0.6, 0.9])
    assert timing.ttft_ms == pytest.approx(500)
    assert timing.itl_ms == pytest.approx([100, 300])
    assert timing.tpot_ms == pytest.approx(200)
    assert timing.output_throughput == pytest.approx(3 / 0.9)


def test_what_was_not_measured_is_none() -> None:
    assert (Timing([]).ttft_ms, Timing([]).output_throughput, Timing([0.5]).tpot_ms) == (None, None, None)
    assert Counts().hit_rate is None
    stats = engine_stats(CacheCounts(2), ReadCounts())
    assert stats.hit_rate == {"prefill": None, "decode": None}
    assert stats.bytes_read_per_token is None


def test_counts_are_summed_by_phase_and_by_layer() -> None:
    counts = CacheCounts(2)
    counts.add(PREFILL, 0, 6, 6, 6)
    counts.add(DECODE, 0, 2, 1, 0)
    counts.add(DECODE, 1, 2, 0, 0)
    reads = ReadCounts(bytes_read=[600, 100], stall_seconds=[1.0, 0.5], tokens=[3, 4])
    stats = engine_stats(counts, reads)
    assert (stats.accesses, stats.hits, stats.misses, stats.first_touches) == (10, 3, 7, 6)
    assert stats.hit_rate == {"prefill": 0, "decode": 0.75}
    assert stats.misses_by_layer == [7, 0]
    assert stats.misses_by_phase == {"prefill": 6, "decode": 1}
    assert (stats.bytes_read, stats.bytes_read_per_token) == (700, 25)


def test_peak_memory_is_at_least_what_was_just_used() -> None:
    before = peak_rss_bytes()
    block = bytearray(64 * 2**20)
    block[::4096] = b"x" * len(block[::4096])
    after = peak_rss_bytes()
    assert before is not None
    assert after is not None
    assert after >= max(before, len(block))
