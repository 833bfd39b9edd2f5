"""metrics.jsonl: the keys users expect, each step once, cut back on resume; Weights & Biases gets a copy."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from training.arguments import TrainArguments
from training.loop import train
from training.run_folder import metrics as tracking_module
from training.run_folder.metrics import Tracker

METRICS = {"train/loss": 2.5, "moe/reuse_rate_mean": 0.25}


def tracker(
    run_dir: Path, *, step: int = 0, wandb_id: str | None = None, active: bool = True, **changed: Any
) -> Tracker:
    values = {"model_name_or_path": "base", "output_dir": str(run_dir), "run_name": "test", "max_steps": 10}
    return Tracker(TrainArguments(**{**values, **changed}), step=step, wandb_id=wandb_id, active=active)


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def log_steps(tracking: Tracker, *steps: int) -> None:
    for step in steps:
        tracking.log(step, METRICS)
        tracking.advance(step, METRICS)
    tracking.flush()
    tracking.close()


def test_a_logged_step_is_a_line_with_its_number(tmp_path: Path) -> None:
    log_steps(tracker(tmp_path), 1, 10)
    assert lines(tmp_path) == [{"train/global_step": step, **METRICS} for step in (1, 10)]


def test_a_line_can_be_read_before_the_run_ends(tmp_path: Path) -> None:
    tracking = tracker(tmp_path)
    tracking.log(1, METRICS)
    assert len(lines(tmp_path)) == 1
    tracking.close()


@pytest.mark.parametrize(("step", "expected"), [(0, []), (2, [1, 2]), (3, [1, 2, 3]), (9, [1, 2, 3, 4])])
def test_lines_after_the_checkpoint_are_cut_off(step: int, expected: list[int], tmp_path: Path) -> None:
    log_steps(tracker(tmp_path), 1, 2, 3, 4)
    tracker(tmp_path, step=step).close()
    assert [line["train/global_step"] for line in lines(tmp_path)] == expected


@pytest.mark.parametrize("rest", ['{"train/global_step": 3, "train/lo', "{", "\n"])
def test_a_line_that_a_crash_cut_off_is_dropped(rest: str, tmp_path: Path) -> None:
    log_steps(tracker(tmp_path), 1, 2)
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(rest)
    log_steps(tracker(tmp_path, step=2), 3)
    assert [line["train/global_step"] for line in lines(tmp_path)] == [1, 2, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_another_process_than_the_main_one_writes_nothing(tmp_path: Path) -> None:
    tracking = tracker(tmp_path, active=False, report_to="wandb")
    log_steps(tracking, 1)
    assert list(tmp_path.iterdir()) == []
    assert tracking.wandb_id is None


def test_the_progress_bar_shows_loss_reuse_rate_and_time_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log_steps(tracker(tmp_path, step=4, max_steps=10), 5)
    shown = capsys.readouterr().err.split("\r")[-1]
    assert "test:  50%" in shown
    assert "5/10 [" in shown
    assert "loss=2.5000, reuse=0.250" in shown


@pytest.mark.parametrize(
    ("objective", "further"),
    [("remoe", set()), ("ce_only", set()), ("cache", {"cache/lru/C3/hit_rate", "cache/lru/C5/hit_rate"})],
)
def test_a_run_logs_the_keys_users_expect(
    objective: str, further: set[str], train_args: Callable[..., TrainArguments]
) -> None:
    args = train_args(objective=objective, cache_slots=[3, 5], max_steps=5, logging_steps=2)
    train(args)
    found = lines(Path(args.output_dir))
    assert [line["train/global_step"] for line in found] == [1, 2, 4, 5]
    expected = {
        "train/loss", "train/reuse_loss", "train/trust_kl", "train/smooth_loss", "train/lag_loss",
        "train/working_set_loss", "train/learning_rate", "train/grad_norm", "train/num_tokens", "train/global_step",
        "moe/reuse_rate_mean", "moe/layer_0/reuse_rate", "moe/layer_1/reuse_rate", "moe/cv_mean",
        "moe/dead_expert_frac_mean", "time/tokens_per_second",
    }  # fmt: skip
    for line in found:
        assert line.keys() == expected | further
        assert all(isinstance(value, float | int) for value in line.values())
        assert line["moe/reuse_rate_mean"] == pytest.approx(
            (line["moe/layer_0/reuse_rate"] + line["moe/layer_1/reuse_rate"]) / 2
        )


def test_the_loss_that_is_logged_is_cross_entropy_whatever_the_objective(
    train_args: Callable[..., TrainArguments],
) -> None:
    found = []
    for objective in ("ce_only", "remoe", "cache"):
        args = train_args(objective=objective, max_steps=1, output_dir=f"{train_args().output_dir}_{objective}")
        train(args)
        found.append(lines(Path(args.output_dir))[0]["train/loss"])
    assert found[0] == found[1] == found[2]


class FailingRun:
    """A W&B run that stops working after so many calls."""

    id = "abc"

    def __init__(self, works: int) -> None:
        self.works = works

    def log(self, *_: Any, **__: Any) -> None:
        self.works -= 1
        if self.works < 0:
            raise OSError("the service is gone")

    finish = log


@pytest.mark.parametrize("works", [0, 1, 2])
def test_a_failing_copy_costs_the_copy_and_nothing_else(
    works: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking_module, "_start_wandb", lambda *_, **__: FailingRun(works))
    tracking = tracker(tmp_path, report_to="wandb")
    log_steps(tracking, 1, 2)
    assert [line["train/global_step"] for line in lines(tmp_path)] == [1, 2]
    said = capsys.readouterr().out
    assert said.count("W&B failed (OSError: the service is gone); training goes on") == 1
    assert str(tmp_path / "metrics.jsonl") in said
    assert tracking.wandb_id == "abc", "a later resume goes on with the same run"


def test_a_copy_that_cannot_even_start_costs_nothing_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise PermissionError("not writable")

    monkeypatch.setattr(tracking_module, "_start_wandb", fails)
    log_steps(tracker(tmp_path, report_to="wandb", wandb_id="before"), 1)
    assert len(lines(tmp_path)) == 1
    assert "W&B failed (PermissionError: not writable)" in capsys.readouterr().out


def test_once_a_minute_a_line_that_stays_says_how_it_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 30.0, 61.0, 61.0, 90.0, 122.0, 122.0])
    monkeypatch.setattr(tracking_module.time, "monotonic", lambda: next(clock))
    log_steps(tracker(tmp_path), 1, 2, 3, 4)
    said = [line.split("  ", 1)[1] for line in capsys.readouterr().out.splitlines()]
    assert said == [f"test: step {step} of 10, loss 2.5000, reuse 0.250" for step in (2, 4)]
