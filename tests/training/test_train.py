"""`python -m training.train`: what a user may get wrong ends in exit code 2 and one line that helps."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.command import run
from training.run_folder import checkpoint
from training.train import main

Values = Callable[..., dict[str, Any]]


@pytest.fixture
def config(train_values: Values, tmp_path: Path) -> Callable[..., Path]:
    """`config(key=value, ...)`: a YAML file of a tiny run."""

    def make(**changed: Any) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(train_values(**changed)), encoding="utf-8")
        return path

    return make


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that a user's mistake ends."""
    capsys.readouterr()
    assert run(main, arguments) == 2
    written = capsys.readouterr().err
    assert "Traceback" not in written
    lines = [line for line in written.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, written
    assert written.endswith(f"{lines[0]}\n")
    return lines[0]


def test_a_good_config_trains(config: Callable[..., Path], tmp_path: Path) -> None:
    assert run(main, [str(config()), "objective=cache", f"output_dir={tmp_path / 'other'}"]) == 0
    assert (tmp_path / "other" / "router_delta" / "router_delta.json").is_file()
    assert "objective: cache" in (tmp_path / "other" / "config.yaml").read_text(encoding="utf-8")


def test_overrides_may_stand_on_both_sides_of_an_option(
    config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = error_of([str(config()), "max_steps=1", "--accelerate-config", "nowhere.yaml", "seed=1"], capsys)
    assert "accelerate config nowhere.yaml does not exist" in found


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "examples:\n  remoe train configs/train/" in shown
    assert "accelerate launch --config_file configs/accelerate/cpu_2_processes.yaml -m training.train" in shown


def test_a_typo_in_an_override_suggests_the_nearest_key(
    config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    found = error_of([str(config()), "learning_rte=0.1"], capsys)
    assert "unknown key learning_rte; did you mean learning_rate?" in found


def test_a_typo_in_the_file_suggests_the_nearest_key(
    config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "config.yaml: unknown key max_step; did you mean max_steps?" in error_of([str(config(max_step=3))], capsys)


def test_a_missing_config_suggests_the_nearest_file(
    config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    found = error_of([str(config().with_name("confg.yaml"))], capsys)
    assert "confg.yaml does not exist; did you mean" in found


@pytest.mark.parametrize("name", ["/nowhere/model", "nowhere", "no_such_org/no_such_model"])
def test_a_missing_model_is_named(name: str, config: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert name in error_of([str(config(model_name_or_path=name))], capsys)


def test_a_model_without_experts_is_named(
    config: Callable[..., Path], model_dir: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    found = error_of([str(config(model_name_or_path=str(model_dir("llama"))))], capsys)
    assert "LlamaForCausalLM (llama) has no routers" in found
    assert "give a mixture-of-experts model" in found


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", None, "a.txt does not exist"),
        ("a.txt", b"caf\xe9 au lait", "a.txt is not UTF-8 text (byte 3"),
        ("a.txt", b"\n", "a.txt is empty"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"txt": "x"}\n', "a.jsonl, line 1: needs a field text"),
        ("a.jsonl", b'{"text": ""}\n', "the data set holds no text"),
        ("a.txt", b"short", "the data has 7 tokens, fewer than one row of max_length=24"),
        ("a.csv", b"x", "must end in .jsonl or .txt"),
    ],
)
def test_a_bad_train_file_is_named(
    name: str,
    content: bytes | None,
    message: str,
    config: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert message in error_of([str(config(train_file=str(tmp_path / name)))], capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("domains=[poems]", "domain 'poems' is not in the corpus"),
        ("dataset_split=dev", "split 'dev' is not in the corpus"),
        ("dataset_name=/nowhere", "data set /nowhere (validation) cannot be loaded"),
        ("lr_scheduler_type=cosinus", "lr_scheduler_type"),
        ("cache_slots=[1]", "a cache of 1 experts cannot hold the 2"),
        ("resume_from_checkpoint=/nowhere", "/nowhere is not a checkpoint folder"),
        ("max_steps=0", "max_steps=0: write a number of at least 1"),
        ("learning_rate=fast", "learning_rate"),
    ],
)
def test_a_bad_value_is_named(
    override: str, message: str, config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in error_of(
        [str(config(train_file=None, dataset_split="validation", objective="cache")), override], capsys
    )


def test_a_run_that_is_there_is_not_written_over(
    config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(main, [str(config())]) == 0
    found = error_of([str(config())], capsys)
    assert f"output_dir={tmp_path / 'run'} already holds a run; write resume_from_checkpoint=auto" in found


def test_a_missing_accelerate_config_says_where_the_shipped_ones_are(
    config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    found = error_of([str(config()), "--accelerate-config", "nowhere.yaml"], capsys)
    assert "accelerate config nowhere.yaml does not exist; shipped ones are under configs/accelerate/" in found


def test_rows_that_are_left_out_are_told_and_written_down(
    config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.dumps({"text": "some tea " * 20})] * 3 + ['{"txt": "some tea"}']
    (tmp_path / "data.jsonl").write_text("\n".join(rows), encoding="utf-8")
    path = config(train_file=str(tmp_path / "data.jsonl"), max_steps=1)
    assert "error: 1 of 4 rows cannot be used; " in error_of([str(path)], capsys)
    assert not (tmp_path / "run").exists()
    assert run(main, [str(path), "skip_bad_rows=true"]) == 0
    assert (
        f"1 of 4 rows cannot be used\n  {tmp_path / 'data.jsonl'}, line 4: needs a field text"
        in capsys.readouterr().out
    )
    assert json.loads((tmp_path / "run" / "proof.json").read_text(encoding="utf-8"))["rows_left_out"] == 1


def test_flags_of_a_launcher_need_its_yaml(config: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    found = error_of([str(config()), "--machine_rank", "1", "max_steps=1"], capsys)
    assert "--machine_rank needs --accelerate-config, whose YAML it changes" in found


@pytest.mark.parametrize("leave_bytes", [0, 8192, 40_000])
def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_space(
    leave_bytes: int,
    full_disk: Path,
    config: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [str(config(output_dir=str(full_disk / "run"), save_steps=1, save_total_limit=9, max_steps=30))]
    assert run(main, [*arguments, f"output_dir={tmp_path / 'whole'}"]) == 0
    filler = full_disk / "filler"
    filler.write_bytes(b"x" * (shutil.disk_usage(full_disk).free - leave_bytes))
    assert "No space left" in (found := error_of(arguments, capsys)) or "disk is full" in found
    filler.unlink()
    assert run(main, [*arguments, "resume_from_checkpoint=auto", "save_total_limit=2"]) == 0
    saved = [folder / "checkpoint-30" / checkpoint.TRAINED for folder in (full_disk / "run", tmp_path / "whole")]
    assert saved[0].read_bytes() == saved[1].read_bytes()
