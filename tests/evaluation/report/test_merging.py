"""Several evaluations as one: arms side by side, and what is not comparable is refused."""

from typing import Any

import pytest

from configs.load import UserError
from evaluation.report.documents import markdown
from evaluation.report.merging import merged
from evaluation.report.summary import time_ratio
from evaluation.results import Results
from tests.evaluation.made_results import made_results

CONFIG = {
    "dtype": "float32",
    "quality": {"tasks": ["letters"], "limit": 100, "batch_size": 8},
    "routing": {"split": "test"},
}


def evaluation(arms: tuple[str, ...] = ("base", "remoe"), **config: Any) -> Results:
    results = made_results(arms)
    results.reproduce.config = {**CONFIG, **config}
    return results


def test_arms_of_all_stand_beside_the_first_base() -> None:
    found = merged({"here": evaluation(), "board": evaluation(("base", "cache")), "more": evaluation()})
    assert list(found.arms) == ["base", "here: remoe", "board: base", "board: cache", "more: base", "more: remoe"]
    assert found.arms["board: cache"].runs[0].routing == evaluation(("base", "cache")).arms["cache"].runs[0].routing
    assert set(found.reproduce.machine) == {"here", "board", "more"}
    assert "board: cache" in markdown(found)


def test_times_of_different_evaluations_are_not_paired() -> None:
    both = {name: evaluation() for name in ("here", "board")}
    for results in both.values():
        for arm in results.arms.values():
            for row in arm.runs[0].decode or []:
                row.ttft_ms = row.tpot_ms = [5.0, 6.0, 7.0, 8.0, 9.0, 10.0]
    found = merged(both)
    budget = (found.arms["base"].runs[0].decode or [])[1].expert_cache_bytes
    assert time_ratio(found, "here: remoe", budget, "tpot_ms") is not None
    assert time_ratio(found, "board: remoe", budget, "tpot_ms") is None
    assert (both["board"].arms["remoe"].runs[0].decode or [])[0].tpot_ms, "what was given is left as it was"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quality": {"tasks": ["letters"], "limit": 50}}, r"quality.limit is 100 in here and 50 in board"),
        ({"quality": {"tasks": ["letters", "more"], "limit": 100}}, r"quality.tasks is \['letters'\] in here"),
        ({"dtype": "bfloat16"}, "dtype is 'float32' in here and 'bfloat16' in board"),
        ({"routing": {"split": "validation"}}, "routing.split is 'test' in here"),
    ],
)
def test_what_measured_different_things_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        merged({"here": evaluation(), "board": evaluation(**change)})


def test_how_it_was_run_may_differ() -> None:
    quality = {"tasks": ["letters"], "limit": 100, "batch_size": 64}
    run, loop = evaluation(quality=quality, memory_budget="1GiB", decode={"demands": [1]}), evaluation()
    loop.reproduce.config = {"run": {"seeds": [0]}, "evaluation": loop.reproduce.config}
    assert len(merged({"here": evaluation(), "board": run, "loop": loop}).arms) == 6


def test_another_model_and_other_weights_are_refused() -> None:
    other = evaluation()
    other.model.experts = 64
    with pytest.raises(UserError, match="the model's experts is 32 in here and 64 in board"):
        merged({"here": evaluation(), "board": other})
    other = evaluation()
    assert other.arms["base"].runs[0].routing is not None
    other.arms["base"].runs[0].routing.nll = 3.5
    with pytest.raises(UserError, match=r"has 3\.400 nats a token in here and 3\.500 in board"):
        merged({"here": evaluation(), "board": other})
