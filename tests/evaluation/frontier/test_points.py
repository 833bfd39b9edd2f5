"""Points: intervals, what is chosen and on which texts, and a frontier that goes on where it was killed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.load import UserError, load
from evaluation.frontier import generation
from evaluation.frontier import measure as measure_module
from evaluation.frontier.arguments import FrontierArguments
from evaluation.frontier.choice import best, choices, pareto, priced
from evaluation.frontier.measure import texts_of
from evaluation.frontier.points import Found, compare
from evaluation.frontier.result import Combination, Interval, Measure, Point
from evaluation.frontier.steps import Steps
from launch.frontier import main
from training.model.loading import load_pretrained, load_tokenizer
from training.model.routers import router_parameters
from training.run_folder import router_delta

ROOT = Path(__file__).parents[3]
MODEL = str(ROOT / "data" / "embedded" / "model")
SMALL = """
slots: [8]
policies: [lru, decayed]
levers: ["prior:delta=0.05", "prior:space=logits,delta=0.2"]
per_layer: [prior]
per_layer_deltas: [0.1]
gates: [0.001, 0.5]
priced_at: [0.5]
new_tokens: 5
texts_per_domain: 2
max_length: 16
domains: [prose, code]
dtype: float32
"""


def steps(losses: list[float], loads: list[int]) -> Steps:
    return Steps(np.array(losses), np.array(loads), np.full(len(loads), 100), 8, 0.5)


def test_costs_and_savings_are_of_the_sums_and_seeds_are_averaged_text_by_text() -> None:
    base = Found([steps([10.0, 20.0, 30.0], [50, 60, 70])])
    here = Found([steps([10.1, 20.2, 30.3], [25, 30, 35]), steps([10.3, 20.4, 30.5], [15, 24, 35])])
    found = compare(here, base, (3, 11), expert_bytes=100)
    changes = np.array([0.2, 0.3, 0.4])
    assert found.cost.value == pytest.approx(np.expm1(changes.mean() / 10))
    assert np.expm1(0.0199) < found.cost.low < found.cost.value < found.cost.high < np.expm1(0.0401)
    assert found.fewer.value == pytest.approx(1 - 82 / 180)
    assert found.fewer.low < found.fewer.value < found.fewer.high
    assert found.costs_of_seeds == pytest.approx([np.expm1(0.02), np.expm1(0.04)])
    assert found.fewer_of_seeds == pytest.approx([0.5, 1 - 74 / 180])
    assert found.loads_per_token == pytest.approx(82 / 30)
    assert found.bytes_per_token == pytest.approx(100 * 82 / 30)
    assert found.swapped_per_token == pytest.approx(8 / 30)
    itself = compare(base, base, (3, 11), expert_bytes=None)
    assert (itself.cost, itself.fewer, itself.bytes_per_token) == (Interval(0, 0, 0), Interval(0, 0, 0), None)


def measured(cost: float, fewer: float) -> Measure:
    of: dict[str, Any] = {"cost": Interval(cost, cost, cost), "fewer": Interval(fewer, fewer, fewer)}
    return Measure(
        **of,
        loads_per_token=1,
        bytes_per_token=None,
        swapped_per_token=0,
        lost_weight_per_token=0,
        costs_of_seeds=[],
        fewer_of_seeds=[],
    )


def point(lever: str, here: tuple[float, float], there: tuple[float, float], arm: str = "untouched") -> Point:
    return Point(arm=arm, lever=lever, slots=8, policy="lru", chosen_by=measured(*here), reported=measured(*there))


def test_what_is_chosen_is_chosen_by_other_texts_than_are_reported() -> None:
    mild = point("prior:delta=0.02", (0.002, 0.2), (0.02, 0.1))
    strong = point("prior:delta=0.04", (0.008, 0.5), (0.001, 0.9))
    assert best([mild, strong], gate=0.005) is mild, "on the texts that are reported the other is better and cheaper"
    assert best([mild, strong], gate=0.01) is strong
    assert best([mild, strong], gate=0.001) is None
    assert pareto([strong, mild, point("prior:delta=0.03", (0.009, 0.4), (0, 1))]) == [mild, strong]


def test_what_is_priced_further_was_chosen_at_the_gates_that_are_named_each_once() -> None:
    mild, strong = point("prior:delta=0.02", (0.002, 0.2), (0, 0)), point("prior:delta=0.04", (0.008, 0.5), (0, 0))
    chosen = choices([mild, strong], [0.001, 0.005, 0.007, 0.01])
    at = [Combination(arm="untouched", lever=f"prior:delta={delta}", slots=8, policy="lru") for delta in (0.02, 0.04)]
    assert priced(chosen, [0.001]) == []
    assert priced(chosen, [0.005, 0.007]) == at[:1]
    assert priced(chosen, [0.005, 0.01]) == at


def test_kinds_are_compared_each_for_itself() -> None:
    every = [
        point("none", (0, 0), (0, 0)), point("prior:delta=0.02", (0.002, 0.2), (0, 0)),
        point("prior:space=logits,delta=0.1", (0.002, 0.1), (0, 0)), point("prior:delta=0.1/0.2", (0.002, 0.2), (0, 0)),
        point("prior:delta=1,swaps=1", (0.002, 0.3), (0, 0)),
        point("none", (0.002, 0.1), (0, 0), arm="trained"),
        point("prior:delta=0.02+drop:below=0.1", (0.02, 0.6), (0, 0), arm="trained"),
    ]  # fmt: skip
    found = {choice.kind: choice.point for choice in choices(every, [0.01])}
    assert {kind: chosen and chosen.lever for kind, chosen in found.items()} == {
        "untouched": "none", "untouched, prior in probability": "prior:delta=0.02",
        "untouched, prior in logits": "prior:space=logits,delta=0.1",
        "untouched, prior in probability with bounds": "prior:delta=1,swaps=1", "untouched, any lever": "prior:delta=1,swaps=1",
        "untouched, prior in probability by layer": "prior:delta=0.1/0.2",
        "trained": "none", "trained, prior in probability and dropping": None,
    }  # fmt: skip


def test_the_texts_that_are_chosen_by_and_those_that_are_reported_have_nothing_in_common(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(MODEL)
    shared: dict[str, Any] = {"model": MODEL, "output_dir": "x", "max_length": 16, "texts_per_domain": 5}
    (tmp_path / "own.txt").write_text("\n\n".join(f"Paragraph {n} of my own text. " * 9 for n in range(30)), "utf-8")
    for given in ({"domains": ["prose", "code"]}, {"groups": {"mine": str(tmp_path / "own.txt")}}):
        texts = texts_of(FrontierArguments(**shared, **given), tokenizer)
        assert {name: len(of_name) for name, of_name in texts.items()} == dict.fromkeys(
            ("chosen_by", "reported"), 10 if "domains" in given else 5
        )
        rows = [{tuple(row) for row in of_name.tolist()} for of_name in texts.values()]
        assert not rows[0] & rows[1]
    (tmp_path / "own.txt").write_text("too little", "utf-8")
    with pytest.raises(UserError, match="group mine has 0 pieces of 16 tokens"):
        texts_of(FrontierArguments(**shared, groups={"mine": str(tmp_path / "own.txt")}), tokenizer)


def test_a_frontier_from_its_config_to_its_table_and_on_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "small.yaml").write_text(SMALL, "utf-8")
    base = {
        name: weight.detach() for name, weight in router_parameters(load_pretrained(MODEL, dtype=torch.float32)).items()
    }
    for seed in (0, 1):
        draw = torch.Generator().manual_seed(seed)
        moved = {
            name: weight + 0.3 * weight.std() * torch.randn(weight.shape, generator=draw)
            for name, weight in base.items()
        }
        about = {"objective": "cache", "config": {"seed": seed}}
        digest = router_delta.checkpoint_sha256(MODEL, moved)
        router_delta.save(tmp_path / f"delta{seed}", moved, base_model=MODEL, base_sha256=digest, about=about)
    given = [str(tmp_path / "small.yaml"), f"model={MODEL}", f"arms.moved=[{tmp_path}/delta0,{tmp_path}/delta1]"]
    calls: list[int] = []
    read = measure_module.read_in_steps

    def killed(*args: Any) -> Steps:
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return read(*args)

    monkeypatch.setattr(generation, "MOST_NUMBERS", 1)  # text by text
    monkeypatch.setattr(measure_module, "read_in_steps", killed)
    with pytest.raises(KeyboardInterrupt):
        main([*given, f"output_dir={tmp_path / 'out'}"])
    monkeypatch.setattr(measure_module, "read_in_steps", lambda *args: (calls.append(1), read(*args))[1])
    main([*given, f"output_dir={tmp_path / 'out'}"])
    main([*given, f"output_dir={tmp_path / 'whole'}"])
    parts, whole = (json.loads((tmp_path / name / "frontier.json").read_text("utf-8")) for name in ("out", "whole"))
    for key in ("points", "chosen", "pareto", "prices"):
        assert parts[key] == whole[key]
    by_layer = [p for p in whole["points"] if "/" in p["lever"]]
    assert len(whole["points"]) - len(by_layer) == 2 * 3 * 2
    assert {p["arm"] for p in by_layer} == {"untouched", "moved"}
    assert all(p["lever"].startswith("prior:delta=") and p["lever"].count("/") == 3 for p in by_layer)
    repeated = len(calls)
    main([*given, f"output_dir={tmp_path / 'out'}"])
    assert len(calls) == repeated, "what was measured is not measured again"
    prices = {(p["at"]["arm"], p["at"]["lever"], p["at"]["policy"]): p["written"] for p in whole["prices"]}
    assert prices["untouched", "none", "decayed"]["same"][0] == 5
    assert prices["moved", "none", "decayed"]["kl"][0] > 0
    assert all(price["tasks"] is None for price in whole["prices"])
    for name in ("frontier.html", "frontier.md", "frontier.png"):
        assert (tmp_path / "out" / name).stat().st_size > 1000
    first = whole["points"][0]
    assert (first["arm"], first["lever"], first["policy"], first["reported"]["cost"][0]) == (
        "untouched",
        "none",
        "lru",
        0,
    )
    moved_alone = next(p for p in whole["points"] if (p["arm"], p["lever"]) == ("moved", "none"))
    assert len(set(moved_alone["reported"]["costs_of_seeds"])) == 2
    shown = capsys.readouterr().out
    assert "untouched, prior in probability" in shown
    assert "moved, any lever" in shown
    assert "at most +50.00" in shown


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("levers=[prio]", "lever 'prio' is not known"),
        ("policies=[best]", "policies has 'best'; write of lru"),
        ("scope=all", "scope has 'all'"),
        ("report_split=validation", "what is chosen must be seen anew"),
        ("arms.untouched=x", "an arm cannot be called untouched"),
        ("slots=[]", "slots and policies must each name at least one"),
        ("max_length=1", "max_length=1: write a number of at least 2"),
        ("new_tokens=192", "new_tokens=192: write a number of at least 0 and below 192"),
        ("priced_at=[0.03]", "must be among gates"),
        ("per_layer=[prio]", "lever 'prio' is not known"),
        ("per_layer_deltas=[0.1,0.05]", "write rising numbers above 0"),
        ("groups={mine: 3}", "group mine is 3"),
    ],
)
def test_mistakes_are_named_before_anything_is_loaded(key: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load(FrontierArguments, ROOT / "configs" / "frontier" / "levers.yaml", [key])


def test_a_cache_that_does_not_hold_one_tokens_experts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="slots=3: one token uses 4 experts of a layer"):
        main(
            [
                str(ROOT / "configs" / "frontier" / "levers.yaml"),
                f"model={MODEL}",
                "slots=[3]",
                f"output_dir={tmp_path}",
            ]
        )
