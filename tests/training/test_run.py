"""A run: stopping and going on changes no number, and a full disk loses nothing."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from configs.load import UserError
from data.batches import PackedRows
from training import loop
from training import run as run_module
from training.arguments import TrainArguments
from training.loop import train, train_step
from training.model.loading import load_pretrained
from training.run import Run, TakenStep, build, save_checkpoint
from training.run_folder import checkpoint, router_delta
from training.step import take_step

Arguments = Callable[..., TrainArguments]


def fill(folder: Path, *, leave_bytes: int) -> Path:
    """Write a file until only so much is free."""
    filler = folder / "filler"
    filler.write_bytes(b"x" * (shutil.disk_usage(folder).free - leave_bytes))
    return filler


def metrics_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def without_time(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in lines]


def assert_same_run(one: Path, other: Path, *, step: int) -> None:
    """Bit for bit: metrics, routers, optimizer, random state, and the state of schedule and data."""
    assert without_time(metrics_of(one)) == without_time(metrics_of(other))
    for name in (checkpoint.TRAINED, checkpoint.OPTIMIZER, checkpoint.RANDOM):
        found, expected = (load_file(run / f"checkpoint-{step}" / name) for run in (one, other))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found), name
    assert checkpoint.load_state(one / f"checkpoint-{step}") == checkpoint.load_state(other / f"checkpoint-{step}")
    found, expected = (load_file(run / "router_delta" / router_delta.WEIGHTS) for run in (one, other))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


# stopping and going on


class Stop(Exception):
    pass


def train_until(args: TrainArguments, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, and be interrupted just before the step after `step`."""

    def stepping(run: Run) -> TakenStep:
        if run.step == step:
            raise Stop
        return take_step(run)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", stepping)
        with pytest.raises(Stop):
            train(args)


@pytest.mark.parametrize("objective", ["remoe", "cache"])
@pytest.mark.parametrize("stops", [[2], [3], [5], [1, 4, 5]])
def test_a_resumed_run_equals_one_that_was_never_stopped(
    objective: str, stops: list[int], train_args: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when it was stopped before its first checkpoint, and with metrics logged after the last one."""
    values = {"objective": objective, "max_steps": 6, "warmup_steps": 3}
    train(train_args(**values, output_dir=str(tmp_path / "whole")))
    stopped = train_args(**values, output_dir=str(tmp_path / "stopped"), resume_from_checkpoint="auto")
    for stop in stops:
        train_until(stopped, stop, monkeypatch)
        torch.manual_seed(stop)  # a new process would not have the old one's random state either
    train(stopped)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole", step=6)


def test_experts_on_disk_train_the_same_routers_and_can_be_gone_on_with(
    train_args: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(train_args(output_dir=str(tmp_path / "whole")))
    on_disk = train_args(output_dir=str(tmp_path / "disk"), experts_on_disk=True, resume_from_checkpoint="auto")
    train_until(on_disk, 3, monkeypatch)
    with pytest.raises(UserError, match="was started with experts_on_disk=True, now it is False"):
        train(replace(on_disk, experts_on_disk=False))
    train(on_disk)
    assert without_time(metrics_of(tmp_path / "disk")) == without_time(metrics_of(tmp_path / "whole"))
    found, expected = (load_file(tmp_path / run / "router_delta" / router_delta.WEIGHTS) for run in ("disk", "whole"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant_with_warmup"])
def test_the_learning_rate_goes_on_where_it_was(
    schedule: str, train_args: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = train_args(lr_scheduler_type=schedule, resume_from_checkpoint="auto")
    train_until(args, 3, monkeypatch)
    run = build(args)
    assert run.step == 2
    assert [group["lr"] for group in run.optimizer.param_groups] == run.scheduler.get_last_lr() == [0.01]


def test_a_resumed_run_reads_the_rows_the_whole_one_would_have_read(
    train_args: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[range] = []
    batch_of = PackedRows.batch
    monkeypatch.setattr(PackedRows, "batch", lambda self, rows: (read.append(rows), batch_of(self, rows))[1])
    args = train_args(resume_from_checkpoint="auto", gradient_accumulation_steps=2)
    train_until(args, 3, monkeypatch)
    assert read == [range(first, first + 2) for first in range(0, 12, 2)]
    read.clear()
    train(args)
    assert read == [range(first, first + 2) for first in range(8, 16, 2)]


def test_resuming_with_other_accumulation_but_the_same_rows_is_allowed(
    train_args: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = train_args(resume_from_checkpoint="auto")
    train_until(args, 3, monkeypatch)
    train(train_args(resume_from_checkpoint="auto", per_device_train_batch_size=1, gradient_accumulation_steps=2))
    train(train_args(output_dir=str(tmp_path / "whole")))
    for line, expected in zip(metrics_of(Path(args.output_dir)), metrics_of(tmp_path / "whole"), strict=True):
        assert line["train/loss"] == pytest.approx(expected["train/loss"], abs=1e-5)


def test_a_finished_run_is_only_written_out_again(train_args: Arguments) -> None:
    args = train_args()
    folder = train(args)
    metrics, gates = metrics_of(Path(args.output_dir)), (folder / router_delta.WEIGHTS).read_bytes()
    shutil.rmtree(folder)
    train(replace(args, resume_from_checkpoint="auto"))
    assert metrics_of(Path(args.output_dir)) == metrics
    assert (folder / router_delta.WEIGHTS).read_bytes() == gates


def test_a_named_checkpoint_can_be_gone_back_to(train_args: Arguments) -> None:
    args = train_args()
    train(args)
    out = Path(args.output_dir)
    before = without_time(metrics_of(out))
    train(replace(args, resume_from_checkpoint=str(out / "checkpoint-2")))
    assert without_time(metrics_of(out)) == before


def test_a_half_written_checkpoint_is_not_taken(train_args: Arguments, monkeypatch: pytest.MonkeyPatch) -> None:
    args = train_args(resume_from_checkpoint="auto")
    train_until(args, 3, monkeypatch)
    out = Path(args.output_dir)
    shutil.copytree(out / "checkpoint-2", out / ".checkpoint-3.partial")
    shutil.copytree(out / "checkpoint-2", out / "checkpoint-4")
    (out / "checkpoint-4" / checkpoint.STATE).unlink()
    assert build(args).step == 2


def test_as_many_checkpoints_as_asked_are_kept(train_args: Arguments) -> None:
    args = train_args(save_steps=1, save_total_limit=2, max_steps=5)
    train(args)
    found = sorted(path.name for path in Path(args.output_dir).glob("checkpoint-*"))
    assert found == ["checkpoint-4", "checkpoint-5"]


def test_a_folder_that_holds_a_run_is_not_written_over(train_args: Arguments) -> None:
    args = train_args()
    train(args)
    before = {path: path.read_bytes() for path in Path(args.output_dir).rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="already holds a run; write resume_from_checkpoint=auto to resume it"):
        train(args)
    assert before == {path: path.read_bytes() for path in Path(args.output_dir).rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"learning_rate": 0.02}, "was started with learning_rate=0.01, now it is 0.02"),
        ({"objective": "ce_only"}, "was started with objective=remoe, now it is ce_only"),
        ({"max_steps": 9}, "was started with max_steps=4, now it is 9"),
        ({"seed": 1}, "was started with seed=0, now it is 1"),
        ({"per_device_train_batch_size": 3}, "was written with rows_per_step=2, this run has 3"),
    ],
)
def test_going_on_with_another_config_is_refused(
    changed: dict[str, Any], message: str, train_args: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_until(train_args(), 3, monkeypatch)
    before = (Path(train_args().output_dir) / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=re.escape(message)):
        train(train_args(**changed, resume_from_checkpoint="auto"))
    assert (Path(train_args().output_dir) / "config.yaml").read_bytes() == before
    assert len(metrics_of(Path(train_args().output_dir))) == 3


def test_a_checkpoint_named_for_a_new_folder_is_gone_on_from_by_the_same_config_only(
    train_args: Arguments, tmp_path: Path
) -> None:
    first = train_args()
    train(first)
    named = {
        "resume_from_checkpoint": str(Path(first.output_dir) / "checkpoint-2"),
        "output_dir": str(tmp_path / "new"),
    }
    with pytest.raises(UserError, match=r"checkpoint-2 was started with learning_rate=0.01, now it is 0.02"):
        train(train_args(**named, learning_rate=0.02))
    assert not (tmp_path / "new").exists()
    train(train_args(**named))
    assert without_time(metrics_of(tmp_path / "new")) == without_time(metrics_of(Path(first.output_dir)))[2:]


def test_going_on_with_changed_data_is_refused_and_with_the_same_data_elsewhere_is_not(
    train_args: Arguments, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = tmp_path / "moved.txt"
    shutil.copy(text_file, moved)
    train_until(train_args(), 3, monkeypatch)
    assert build(train_args(resume_from_checkpoint="auto", train_file=str(moved))).step == 2
    moved.write_text(moved.read_text() + "\n\none more", encoding="utf-8")
    with pytest.raises(UserError, match=r"data_sha256=.*the data or the tokenizer changed"):
        build(train_args(resume_from_checkpoint="auto", train_file=str(moved)))


def test_the_same_base_under_another_path_is_gone_on_with(
    train_args: Arguments, model_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_until(train_args(), 3, monkeypatch)
    copied = shutil.copytree(model_dir("qwen2_moe"), tmp_path / "base")
    assert build(train_args(resume_from_checkpoint="auto", model_name_or_path=f"{copied}/")).step == 2


def test_a_run_may_be_made_longer_where_its_schedule_has_no_end(train_args: Arguments) -> None:
    endless = {"lr_scheduler_type": "constant_with_warmup"}
    train(train_args(**endless, max_steps=2))
    train(train_args(**endless, max_steps=4, resume_from_checkpoint="auto"))
    longer = without_time(metrics_of(Path(train_args().output_dir)))
    assert len(longer) == 4
    with pytest.raises(UserError, match="was started with max_steps=4, now it is 3"):
        train(train_args(**endless, max_steps=3, resume_from_checkpoint="auto"))


def test_going_on_with_another_base_model_in_the_same_folder_is_refused(
    train_args: Arguments, model_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Path(shutil.copytree(model_dir("qwen2_moe"), tmp_path / "base"))
    args = train_args(model_name_or_path=str(base), resume_from_checkpoint="auto")
    train_until(args, 3, monkeypatch)
    model = load_pretrained(str(base))
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[3] += 0.5
    model.save_pretrained(base)
    with pytest.raises(UserError, match="was written with frozen_sha256="):
        train(args)


def test_a_checkpoint_of_another_program_is_refused(train_args: Arguments, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / checkpoint.STATE).write_text('{"global_step": 5}', encoding="utf-8")
    with pytest.raises(UserError, match="was written with rows_per_step=None"):
        train(train_args(resume_from_checkpoint=str(tmp_path / "checkpoint-5")))


def test_sharding_what_trains_is_refused_before_anything_is_loaded(
    train_args: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "weight_layout", lambda _: "fsdp2")
    monkeypatch.setattr(run_module, "LayerwiseCheckpoint", None)  # would fail
    with pytest.raises(UserError, match=r"fsdp2 here shards what does not train; with trainable=all use .*multi_gpu"):
        train(train_args(trainable="all", distill_coef=0.0))


# a full disk


def test_a_disk_that_fills_up_keeps_the_earlier_checkpoint_and_can_be_gone_on_from(
    full_disk: Path, train_args: Arguments, tmp_path: Path
) -> None:
    args = train_args(output_dir=str(full_disk / "run"))
    run = build(args)
    for _ in range(2):
        train_step(run)
    save_checkpoint(run)
    train_step(run)
    filler = fill(full_disk, leave_bytes=8192)
    with pytest.raises(
        UserError, match=r"checkpoint-3 cannot be written .*No space left.*free some space and start again"
    ):
        save_checkpoint(run)
    assert [path.name for path in (full_disk / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    filler.unlink()
    train(replace(args, resume_from_checkpoint="auto"))
    train(train_args(output_dir=str(tmp_path / "whole")))
    assert without_time(metrics_of(tmp_path / "whole"))[2:] == without_time(metrics_of(full_disk / "run"))


def test_a_disk_that_is_full_at_the_end_loses_nothing(full_disk: Path, train_args: Arguments) -> None:
    args = train_args(output_dir=str(full_disk / "run"))
    folder = train(args)
    expected = (folder / router_delta.WEIGHTS).read_bytes()
    shutil.rmtree(folder)
    filler = fill(full_disk, leave_bytes=0)
    with pytest.raises((UserError, OSError), match=r"No space left"):
        train(replace(args, resume_from_checkpoint="auto"))
    assert not (full_disk / "run" / "router_delta").exists()
    filler.unlink()
    train(replace(args, resume_from_checkpoint="auto"))
    assert (folder / router_delta.WEIGHTS).read_bytes() == expected


def test_a_delta_that_does_not_fit_is_one_clear_error(full_disk: Path, train_args: Arguments) -> None:
    run = build(train_args(output_dir=str(full_disk / "run")))
    (full_disk / "run" / "metrics.jsonl").write_text("{}\n", encoding="utf-8")
    fill(full_disk, leave_bytes=0)
    with pytest.raises(UserError, match=r"router delta .* cannot be written .*No space left"):
        run_module._save_delta(run, full_disk / "run" / "router_delta")
    assert not [path for path in (full_disk / "run").iterdir() if path.name.startswith("router_delta")]


# what can be known before the work


def test_an_output_that_cannot_be_written_is_refused_before_the_model_is_loaded(
    train_args: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    monkeypatch.setattr("training.model.loading.build_model", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(UserError, match=r"cannot be made or written into.*name an output elsewhere"):
        build(train_args(output_dir=str(tmp_path / "file" / "run")))


def test_a_delta_that_could_not_be_exported_is_refused_before_a_step(
    train_args: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = train_args()
    routers = set(load_pretrained(str(args.model_name_or_path)).state_dict())
    asked: list[str] = []

    def refuse(folder: str, trained: dict[str, torch.Tensor]) -> None:
        asked.append(folder)
        assert trained.keys() <= routers
        raise UserError(f"{folder} holds no tensor that becomes a router")

    monkeypatch.setattr(run_module, "stored_tensors", refuse)
    monkeypatch.setattr(loop, "take_step", lambda *_: pytest.fail("a step was taken"))
    with pytest.raises(UserError, match="holds no tensor that becomes a router"):
        train(args)
    assert asked == [str(args.model_name_or_path)]
    build(replace(args, trainable="all"))  # which exports no delta
