"""The benchmark of tasks: the model in memory answers with the engine's scores."""

import re
from pathlib import Path

import pytest

from configs.load import UserError
from evaluation.benchmark.memory_group import find_hierarchy
from evaluation.benchmark.quality import QualityBenchmark, benchmark

ROOT = Path(__file__).parents[3]


@pytest.mark.filterwarnings("ignore")  # lm_eval and datasets warn about their own insides
def test_sides_score_alike(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "200")
    options = QualityBenchmark(
        model="data/embedded/model", expert_cache="2MiB", tasks=("letters", "perplexity_prose"),
        limit=4, repeats=1, dtype="float32",
    )  # fmt: skip
    benchmark(options)
    shown = capsys.readouterr().out
    for task in options.tasks:
        cells = re.search(rf"{task} .*", shown)
        assert cells is not None
        name, ours, theirs, ratio, difference = (cell.strip() for cell in cells[0].split("│")[:5])
        assert name == task
        assert ours.endswith("s")
        assert theirs.endswith("s")
        assert ratio.endswith("×")
        assert float(difference.split()[0]) < 1e-2


@pytest.mark.slow
@pytest.mark.skipif(find_hierarchy() is None, reason="no memory groups can be made here")
def test_beside_the_offload_each_side_is_in_a_memory_group_of_its_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "200")
    options = QualityBenchmark(
        model="data/embedded/model", memory_budget="smallest + 50%", memory_limit="2GiB", tasks=("letters", "headword"),
        limit=2, repeats=1, dtype="float32", work_dir=str(tmp_path),
    )  # fmt: skip
    benchmark(options)
    shown = capsys.readouterr().out
    assert "batches of 64" in shown
    for task in options.tasks:
        cells = re.search(rf"{task} .*", shown)
        assert cells is not None
        assert cells[0].count("×") == 1


@pytest.mark.slow
@pytest.mark.skipif(find_hierarchy() is None, reason="no memory groups can be made here")
def test_an_engine_that_is_killed_ends_the_benchmark_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    options = QualityBenchmark(
        model="data/embedded/model", memory_budget="40MiB", memory_limit="120MiB", tasks=("letters",), limit=1, repeats=1,
        work_dir=str(tmp_path),
    )  # fmt: skip
    with pytest.raises(UserError, match="our engine, in a memory group of 120MiB: a side ended with exit code -9"):
        benchmark(options)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "write --expert-cache .* or --memory-budget with --memory-limit"),
        ({"expert_cache": "2MiB", "memory_budget": "1GiB"}, "write --expert-cache"),
        ({"memory_budget": "1GiB"}, "--memory-budget and --memory-limit go together"),
    ],
)
def test_what_is_compared_must_be_said(given: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        QualityBenchmark(model="x", **given)  # type: ignore[arg-type]
