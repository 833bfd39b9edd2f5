"""The page of a frontier: what its sentences claim follows from what was reported, chosen by other texts; files read back."""

import json
from pathlib import Path
from typing import Any

import pytest

from configs.load import UserError
from evaluation.frontier.choice import choices, pareto
from evaluation.frontier.result import (
    Combination,
    FrontierResult,
    Interval,
    Measure,
    Point,
    Price,
    WritingPrice,
    read_frontier,
)
from evaluation.report.documents import write_frontier_page
from evaluation.report.frontier_page import frontier_contents, frontier_table, gate_sentence
from evaluation.results import Difference, Reproduction, TaskDifference

GATES = [0.005, 0.01]


def measured(fewer: float, cost: float, half: float = 0.01) -> Measure:
    of = {
        "fewer": Interval(fewer, fewer - half, fewer + half),
        "cost": Interval(cost, cost - half / 20, cost + half / 20),
    }
    return Measure(
        **of, loads_per_token=3.0, bytes_per_token=3000.0, swapped_per_token=1.0, lost_weight_per_token=0.1, costs_of_seeds=[],
        fewer_of_seeds=[],
    )  # fmt: skip


def point(arm: str, lever: str, fewer: float, cost: float, *, reported: Measure | None = None) -> Point:
    by = measured(fewer, cost)
    return Point(arm=arm, lever=lever, slots=8, policy="decayed", chosen_by=by, reported=reported or by)


def found(points: list[Point], prices: list[Price] | None = None) -> FrontierResult:
    made = Reproduction(
        command="remoe frontier x.yaml", commit="abc", config={"slots": [8]}, machine={"cpu": "one"}, seconds={}
    )
    return FrontierResult(
        model="a/model", scope="per_layer", gates=GATES, points=points, chosen=choices(points, GATES),
        pareto=[one.combination for one in pareto(points)], prices=prices or [], reproduce=made,
    )  # fmt: skip


UNTOUCHED = [point("untouched", "none", 0.1, 0.0), point("untouched", "prior:delta=0.06", 0.5, 0.008)]


@pytest.mark.parametrize(
    ("reported", "verdict"),
    [
        (measured(0.6, 0.009), "is met, intervals included"),
        (measured(0.6, 0.0098), "is met by the numbers and not by their intervals"),
        (measured(0.305, 0.009), "is met by the numbers and not by their intervals"),
        (measured(0.29, 0.009), "is missed"),
        (measured(0.6, 0.0101), "is missed"),
    ],
)
def test_the_gate_is_judged_by_the_texts_that_are_reported(reported: Measure, verdict: str) -> None:
    trained = point("trained", "prior:delta=0.04", 0.9, 0.0099, reported=reported)
    sentence = gate_sentence(found([*UNTOUCHED, trained]))
    assert "perplexity (routers of trained, prior:delta=0.04, decayed, 8 slots a layer)" in sentence
    assert sentence.endswith(f"at most +1.00\N{NO-BREAK SPACE}% {verdict}.")
    cheaper = point("trained", "prior:delta=0.02", 0.7, 0.004)
    sentence = gate_sentence(found([*UNTOUCHED, trained, cheaper]))
    if "intervals included" not in verdict:
        assert "is met, intervals included: 70.0" in sentence
        assert sentence.endswith("(routers of trained, prior:delta=0.02, decayed, 8 slots a layer).")
    nothing = found([point("untouched", "none", 0.1, 0.02)])
    assert gate_sentence(nothing).startswith("Nothing that was measured costs at most +1.00")


def test_a_star_says_that_training_is_ahead_of_the_best_lever_alone_by_more_than_both_intervals() -> None:
    for fewer, star in ((0.515, False), (0.53, True)):
        trained = point("trained", "prior:delta=0.04", fewer, 0.008)
        table = frontier_table(found([*UNTOUCHED, trained]), 8)
        row = next(cells for cells in table.rows if cells[0] == "trained, prior in probability")
        assert (" *" in row[2]) == star
        assert row[1] == "–", "there is none within half a percent"
        assert "prior:delta=0.04, decayed" in row[2]
    assert all(" *" not in cell for cells in table.rows if cells[0].startswith("untouched") for cell in cells)


def test_what_a_lever_adds_is_of_the_points_that_were_chosen() -> None:
    lucky = point("trained", "none", 0.2, 0.004, reported=measured(0.9, 0.004))
    better = point("trained", "none", 0.3, 0.004, reported=measured(0.25, 0.004))
    lever = point("trained", "prior:delta=0.04", 0.6, 0.008, reported=measured(0.65, 0.008))
    shown = {
        section.title: section for section in frontier_contents(found([*UNTOUCHED, lucky, better, lever]))["sections"]
    }
    (parts,) = shown["What adds what"].tables
    row = next(cells for cells in parts.rows if cells[0].startswith("+1.00") and cells[1] == "trained")
    assert [cell.replace("\N{NO-BREAK SPACE}", " ") for cell in row[2:]] == ["25.0 %", "65.0 %", "+40.0 pt"]


def test_the_page_is_written_and_the_result_reads_back(tmp_path: Path) -> None:
    one = Interval(0.01, 0.005, 0.02)
    written = WritingPrice(cost=one, kl=one, kl_given=one, ratio=None, same=Interval(9, 8, 10))
    tasks = Difference(tasks={"sums": TaskDifference(difference=-0.01, low=-0.03, high=0.01)}, perplexity={})
    price = Price(at=UNTOUCHED[1].combination, written=written, quality=None, tasks=tasks)
    result = found(UNTOUCHED, [price])
    write_frontier_page(result, tmp_path)
    html, text = ((tmp_path / f"frontier.{kind}").read_text(encoding="utf-8") for kind in ("html", "md"))
    for words in ("prior:delta=0.06", "sums", "remoe frontier x.yaml", "In text that it writes itself"):
        assert words in html
        assert words in text
    assert "<svg" in html
    assert (tmp_path / "frontier.png").read_bytes()[:4] == b"\x89PNG"
    path = tmp_path / "frontier.json"
    path.write_text(result.model_dump_json(by_alias=True), encoding="utf-8")
    assert read_frontier(path) == result


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format_version": 99}, "format_version is 99, 1 is read"),
        ({"points": [{"arm": "x"}]}, r"points\[0\].lever is missing"),
        ({"gates": "many"}, "gates must be a list"),
    ],
)
def test_a_file_that_is_not_as_it_should_be_is_refused_with_the_place(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    content = found(UNTOUCHED).model_dump(mode="json", by_alias=True) | change
    (tmp_path / "frontier.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=words):
        read_frontier(tmp_path / "frontier.json")
    with pytest.raises(UserError, match="cannot be read"):
        read_frontier(tmp_path / "none.json")
    assert Combination(arm="a", lever="b", slots=1, policy="lru") == Combination(
        arm="a", lever="b", slots=1, policy="lru"
    )
