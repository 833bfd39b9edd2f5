"""The benchmark of tasks: both peers answer, with the engine's scores."""

import re
from pathlib import Path

import pytest

from configs.load import UserError
from evaluation.benchmark.quality import QualityBenchmark, benchmark

ROOT = Path(__file__).parents[3]


@pytest.mark.filterwarnings("ignore")  # lm_eval and datasets warn about their own insides
@pytest.mark.parametrize("against", ["resident", "offload"])
def test_sides_score_alike(against: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "200")
    options = QualityBenchmark(
        model="data/embedded/model", expert_cache="2MiB", against=against, tasks=("letters", "perplexity_prose"),  # type: ignore[arg-type]
        limit=4, repeats=1, dtype="float32", batch_sizes=(2, 4),
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


def test_no_batch_size_is_refused() -> None:
    with pytest.raises(UserError, match="batch_sizes names none"):
        QualityBenchmark(model="m", expert_cache="1MiB", batch_sizes=())
