"""The benchmark of the curve: its trace is what it says, and it prints a rate for every shape and scope."""

import pytest

from evaluation.benchmark.curve import SHAPES, CurveBenchmark, TraceShape, benchmark, drifting_trace
from evaluation.engine.cache.reuse import reuse_rate_per_layer


def test_neighbouring_tokens_share_experts_more_than_by_chance() -> None:
    trace = drifting_trace(TraceShape(2, 32, 4), tokens=400, seed=0)
    assert trace.expert_ids.shape == (400, 2, 4)
    assert 2 * 4 / 32 < reuse_rate_per_layer(trace).mean() < 0.6


def test_every_shape_and_scope_gets_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark(CurveBenchmark(accesses=2000, repeats=1))
    printed = capsys.readouterr().out
    for name in SHAPES:
        assert printed.count(name) == 2
    assert printed.count("per_layer") == printed.count("global") == len(SHAPES)
