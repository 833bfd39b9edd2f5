"""The table of policies: regrets of small traces, the long request, and what is printed."""

import numpy as np
import pytest

from configs.load import UserError
from data.corpus import DOMAINS
from evaluation.benchmark.policies import PoliciesBenchmark, benchmark, markdown, one_request, regrets
from evaluation.engine.cache.replay import POLICIES, replay
from tests.evaluation.engine.cache.made_traces import fixed_trace


def test_regret_is_misses_in_units_of_the_optimum() -> None:
    trace = fixed_trace(80)
    found = regrets({"text": trace}, trace, sizes=[4])
    assert set(found) == {("global", 4, "text"), ("per_layer", 4, "text")}
    for (scope, _, _), of_policies in found.items():
        assert list(of_policies) == list(POLICIES)
        assert of_policies["belady"] == 1
        slots = 12 if scope == "global" else 4
        lru, belady = (replay(trace, policy=p, cache_scope=scope, slots=slots).misses for p in ("lru", "belady"))
        assert of_policies["lru"] == pytest.approx(lru / belady)
        assert min(of_policies.values()) == 1


def test_the_long_request_goes_from_text_to_text_and_back() -> None:
    trace = fixed_trace(601)
    long = one_request([trace, trace])
    first, second = trace.expert_ids[:300], trace.expert_ids[300:600]
    assert np.array_equal(long.expert_ids, np.concatenate([first, first, second, second]))
    assert (long.request_id == 0).all()


def test_the_best_of_a_row_is_bold() -> None:
    made = {policy: 2.0 for policy in POLICIES} | {"fifo": 1.5, "belady": 1.0}
    found = {("global", 4, text): made for text in (*DOMAINS, "all domains")}
    lines = markdown(found, scope="global", layers=3, num_experts=16)
    assert lines[0] == "| `global`: experts held | lru | fifo | lfu | lfru | decayed | static |"
    assert lines[2] == "| 12 (25%) | 2.00 | **1.50** | 2.00 | 2.00 | 2.00 | 2.00 |"
    assert lines[3].startswith("| 12 (25%), one long request | 2.00 |")


def test_sizes_below_one_token_are_refused_before_anything_is_replayed() -> None:
    with pytest.raises(UserError, match="2 slots cannot hold the 3 experts"):
        regrets({"text": fixed_trace(10)}, fixed_trace(10), sizes=[4, 2])


def test_options_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UserError, match="--requests is 1; write at least 2"):
        PoliciesBenchmark(requests=1)
    with pytest.raises(UserError, match="--slots '4;6' is no list of numbers; write for example 4,8,16"):
        PoliciesBenchmark(slots="4;6")


@pytest.mark.slow
def test_the_shipped_model_prints_both_scopes(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark(PoliciesBenchmark(requests=2, slots="8"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines if line.startswith("| `")] == [
        "`global`: experts held", "`per_layer`: experts held"
    ]  # fmt: skip
    for line in lines:
        if line.startswith("| 32") or line.startswith("| 8"):
            assert "**" in line.split("|")[6]  # decayed
