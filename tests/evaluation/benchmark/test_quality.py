"""The benchmark of tasks: the model in memory answers with the engine's scores."""

import re
from pathlib import Path

import pytest

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
