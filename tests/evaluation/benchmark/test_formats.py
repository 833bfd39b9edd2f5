"""The benchmark of formats: every kind of slots takes its turn, within the same budget, and rates are of every format."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.load import UserError
from evaluation.benchmark import formats
from evaluation.benchmark.formats import FormatsBenchmark, benchmark
from evaluation.export.quantised_folder import write_quantised

Checkpoint = Callable[..., Path]


def test_every_kind_takes_turns_and_rates_are_measured(
    checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "TRIES", 2)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(formats, "load_tokenizer", lambda _: None)
    monkeypatch.setattr(formats, "document_beginnings", lambda *_, tokens, **__: [list(range(5, 5 + tokens))])
    plain, packed, output = checkpoint("qwen3_moe_blocks"), tmp_path / "int8", tmp_path / "found.json"
    write_quantised(plain, packed, "int8")
    given = {"memory_budget": "smallest + 30%", "prompt_tokens": 8, "max_new_tokens": 4, "repeats": 2}
    benchmark(FormatsBenchmark(models=f"{plain},{packed}", output=str(output), **given))
    found = json.loads(output.read_text())
    assert list(found["sides"]) == ["bfloat16, auto", "int8, ready", "int8, stored", "int8, packed products"]
    assert [side["is_exact"] for side in found["sides"].values()] == [True, True, True, False]
    assert all(len(side["tpot_ms"]) == 2 and min(side["tpot_ms"]) > 0 for side in found["sides"].values())
    assert all(min(side["kernel_share"]) >= 0 for side in found["sides"].values())
    assert {name.split(",")[0] for name in found["rates"]["int8"]} == {"decoded", "multiplied"}
    assert all(rate > 0 for rate in found["rates"]["int8"].values())
    assert "int8, packed products *" in capsys.readouterr().out


def test_a_budget_too_small_for_all_is_told(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "load_tokenizer", lambda _: None)
    monkeypatch.setattr(formats, "document_beginnings", lambda *_, tokens, **__: [list(range(5, 5 + tokens))])
    with pytest.raises(UserError, match="too small for every side"):
        benchmark(FormatsBenchmark(models=str(checkpoint("olmoe")), memory_budget="1KiB"))
