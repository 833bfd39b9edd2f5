"""`remoe make-model`: fills the size it was given, leaves nothing half-made, and says in one message what is wrong."""

import json
from pathlib import Path

import pytest

from configs.load import UserError
from evaluation.engine.store.experts import ExpertStore
from evaluation.engine.store.packing import is_packed
from launch.make_model import main

SMALL = ["--layers", "1", "--hidden", "128", "--experts", "8", "--top-k", "2", "--eor", "0.5", "--check-tokens", "8"]


def test_the_folder_is_complete_and_as_large_as_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "model"
    main(["--output", str(folder), "--size", "3MiB", *SMALL])
    made = json.loads((folder / "made.json").read_text())
    step_bytes = 8 * 3 * 128 * 64 * 2
    assert is_packed(ExpertStore(folder))
    assert 3 * 2**20 - step_bytes < made["weight_bytes"] <= 3 * 2**20
    for name in ("config.json", "tokenizer.json", "README.md", "model.safetensors.index.json"):
        assert (folder / name).is_file()
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    eor = made["measured"]["teacher_forced"]["reuse_rate_mean"]
    assert f"{eor:.3f}" in (folder / "README.md").read_text()
    assert f"{eor:.3f}" in capsys.readouterr().out


def test_an_existing_folder_is_kept(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="exists already; name a new folder"):
        main(["--output", str(tmp_path), *SMALL])
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_a_precision_that_is_not_known_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--output", str(tmp_path / "model"), *SMALL, "--dtype", "int8"])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert all(word in said for word in ("--dtype", "int8", "bfloat16", "float16", "float32"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--size", "1MiB"], r"--size 1MiB is too small .* the smallest is"),
        (["--size", "much"], "--size 'much' is not understood"),
        (["--eor", "1.5"], "--eor 1.5 is no share"),
        (["--seed", "-1"], "--seed -1 is out of range"),
        (["--hidden", "100"], "hidden size 100 is no multiple of 128"),
        (["--size", "900TiB"], "free some space or write a smaller --size"),
        (["--eor", "0.99"], "cannot have an expert reuse"),
    ],
)
def test_mistakes_are_told_and_leave_nothing(tmp_path: Path, flags: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        main(["--output", str(tmp_path / "model"), *SMALL, *flags])
    assert not list(tmp_path.iterdir())
