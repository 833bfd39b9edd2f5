"""The whole loop on the shipped model, with a handful of steps."""

import json
import shutil
from pathlib import Path

import pytest

from configs.command import run
from configs.load import UserError, load
from evaluation.frontier.arguments import FrontierArguments
from evaluation.frontier.result import FRONTIER, read_frontier
from launch import report as report_module
from launch import run as pipeline_module
from launch.run import RunArguments, pipeline

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore")  # lm_eval and datasets warn about their own insides


@pytest.mark.slow
def test_run_trains_evaluates_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    out = tmp_path / "run"
    small = "frontier_overrides=[texts_per_domain=2,max_length=32,new_tokens=4,'domains=[prose,code]']"
    frontier = ["frontier=configs/frontier/demo.yaml", small]
    assert run(pipeline_module.main, ["configs/run/smoke.yaml", f"output_dir={out}", *frontier]) == 0
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert list(results["arms"]) == ["base", "remoe", "cache"]
    assert results["reproduce"]["command"].startswith("remoe run configs/run/smoke.yaml")
    smaller, larger = (plan["division"] for plan in results["plans"])
    assert smaller["slots"] < larger["slots"]
    assert larger["budget_bytes"] == pytest.approx(smaller["budget_bytes"] * 1.15 / 1.05, rel=1e-6)
    assert larger["resident_bytes"] == smaller["resident_bytes"]
    for arm in results["arms"].values():
        for measured in arm["runs"]:
            assert all(row["tokens_equal_resident"] for row in measured["decode"])
            misses = {(row["policy"], row["slots"]): row["misses"] for row in measured["replay"]}
            assert all(misses["belady", slots] <= misses["lru", slots] for slots in (4, 6, 12, 32))
            assert misses["lru", 12] < misses["lru", 6] < misses["lru", 4]
    base, cache = results["arms"]["base"]["runs"][0], results["arms"]["cache"]["runs"][0]
    assert base["difference"] is None
    assert set(cache["difference"]["perplexity"]) == {"prose", "code", "mean"}
    assert [line["train/global_step"] for line in cache["history"]] == [1, 2, 3, 4, 5, 6]
    assert cache["routing"]["reuse_rate_mean"] != base["routing"]["reuse_rate_mean"]
    for name in ("report.html", "report.md"):
        assert "cache" in (out / name).read_text(encoding="utf-8")

    found = read_frontier(out / FRONTIER)
    assert {point.arm for point in found.points} == {"untouched", "remoe", "cache"}
    for name in ("report.html", "report.md"):
        assert "Quality against expert loads, with levers" in (out / name).read_text(encoding="utf-8")
    shutil.copytree(out / "frontier", tmp_path / "copy" / "frontier")
    shutil.copy(out / "results.json", tmp_path / "copy" / "results.json")
    assert run(report_module.main, [str(tmp_path / "copy" / "results.json")]) == 0
    assert (tmp_path / "copy" / "report.md").read_bytes() == (out / "report.md").read_bytes()

    trained = (out / "cache-seed0" / "checkpoint-6" / "trained.safetensors").stat().st_mtime_ns
    pipeline(load(RunArguments, ROOT / "configs/run/smoke.yaml", [f"output_dir={out}"]), command="again")
    assert set(results["reproduce"]["seconds"]) == {"train", "evaluate", "frontier"}
    again = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert set(again["reproduce"]["seconds"]) == {"evaluate"}  # nothing was trained
    assert (out / "cache-seed0" / "checkpoint-6" / "trained.safetensors").stat().st_mtime_ns == trained


def test_a_budget_that_is_no_size_is_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(pipeline_module, "launch_training", lambda *_: pytest.fail("something was trained"))
    (tmp_path / "evaluation.yaml").write_text("plan: {memory_budgets: [1 potato]}", encoding="utf-8")
    overrides = [f"output_dir={tmp_path / 'run'}", f"evaluation={tmp_path / 'evaluation.yaml'}"]
    with pytest.raises(UserError, match="memory budget '1 potato' is not understood"):
        pipeline(load(RunArguments, "configs/run/smoke.yaml", overrides), command="")
    assert not (tmp_path / "run").exists()


def test_every_shipped_run_config_loads() -> None:
    for path in (ROOT / "configs" / "run").glob("*.yaml"):
        args = load(RunArguments, path)
        assert (ROOT / args.train).is_file()
        assert (ROOT / args.evaluation).is_file()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["arms={}"], "at least one"),
        (["arms={a: {}}", "seeds=[]"], "at least one"),
        (["arms={base: {objective: remoe}}"], "cannot be called base"),
        (["sedes=[1]"], "did you mean seeds"),
    ],
)
def test_run_config_that_makes_no_sense_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        load(RunArguments, None, overrides)


def test_mistake_in_an_arm_is_found_before_anything_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    args = load(
        RunArguments, None, ["arms={a: {objective: remoe}, b: {objectve: cache}}", f"output_dir={tmp_path / 'run'}"]
    )
    with pytest.raises(UserError, match="did you mean objective"):
        pipeline(args, command="x")
    assert not (tmp_path / "run").exists()


def test_an_arm_of_the_config_is_left_out_by_null() -> None:
    args = load(RunArguments, ROOT / "configs" / "run" / "demo.yaml", ["arms.remoe=null"])
    assert list(args.arms) == ["ce_only", "cache_miss", "in_the_loop"]
    frontier = load(FrontierArguments, ROOT / "configs" / "frontier" / "in_the_loop.yaml", ["arms.alone=null"])
    assert list(frontier.arms) == ["in_the_loop"]
