"""An evaluation in a real offline run of Weights & Biases, read back from its file."""

import json
from pathlib import Path

import pytest

from evaluation.figures import figures
from evaluation.report.documents import write_results
from launch.tracking import upload
from tests.evaluation.made_results import made_results
from tests.training.run_folder.test_wandb import records


def test_figures_are_those_of_the_results() -> None:
    results = made_results(("base", "remoe"))
    run = results.arms["remoe"].runs[0]
    found = dict(figures(run))
    assert run.quality is not None
    assert run.routing is not None
    assert found["task/letters"] == run.quality.tasks["letters"].value
    assert found["mean_perplexity"] == run.quality.mean_perplexity
    assert found["reuse_rate_mean"] == run.routing.reuse_rate_mean
    row = next(row for row in run.replay or [] if (row.policy, row.slots) == ("lru", 6))
    assert found["miss_rate/lru/6_slots"] == (row.misses or 0) / (row.accesses or 1)
    assert "change/letters" in found
    assert run.difference is not None
    assert found["change/perplexity/mean"] == run.difference.perplexity["mean"].relative
    untouched = dict(figures(results.arms["base"].runs[0]))
    assert not any(name.startswith("change/") for name in untouched), "nothing to compare the base with"


@pytest.mark.slow  # starts the program that writes the file
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_an_offline_run_holds_figures_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    results, folder = made_results(("base", "cache"), cache_seeds=2), tmp_path / "mine"
    folder.mkdir()
    write_results(results, folder)
    upload(results, folder)
    found = records(folder)
    summary = {
        "/".join(item.nested_key) or item.key: json.loads(item.value_json)
        for record in found
        if record.HasField("summary")
        for item in record.summary.update
    }
    seeds = [dict(figures(run)) for run in results.arms["cache"].runs]
    expected = sum(seed["task/letters"] for seed in seeds) / 2
    assert summary["eval/cache/task/letters"] == pytest.approx(expected)
    artifacts = [record.artifact for record in found if record.HasField("artifact")]
    assert [artifact.type for artifact in artifacts] == ["evaluation"]
    names = {entry.path for artifact in artifacts for entry in artifact.manifest.contents}
    assert names >= {"results.json", "report.html", "report.md"}
