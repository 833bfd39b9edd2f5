"""Measured while it trains: the numbers of an evaluation afterwards, and a training that is what it would have been without."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.modeling_layers import GradientCheckpointingLayer

from configs.load import UserError, load
from evaluation.arguments import EvaluationArguments
from evaluation.evaluate import evaluate, trained_arm
from evaluation.in_training import _left_as_it_is
from training import loop
from training.arguments import TrainArguments
from training.loop import train
from training.model.loading import load_pretrained
from training.run_folder import checkpoint

ROOT = Path(__file__).parents[2]
MODEL = str(ROOT / "data" / "embedded" / "model")
SMALL = """
quality: {include_path: data/embedded/tasks, tasks: [letters, headword, perplexity_puzzles], limit: 12}
routing: {requests_per_domain: 2, max_length: 64}
replay: {policies: [lru], slots: [6, 12]}
decode: {prompts_per_domain: 1, prompt_tokens: 16, max_new_tokens: 2, demands: [1.0], repeats: 1}
plan: {memory_budgets: []}
dtype: float32
"""
pytestmark = pytest.mark.filterwarnings("ignore")  # lm_eval and datasets warn about their own insides
Arguments = Callable[..., TrainArguments]


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(ROOT)
    (tmp_path / "small.yaml").write_text(SMALL, "utf-8")
    return str(tmp_path / "small.yaml")


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if not key.startswith("time/")} for line in lines]


def of_evaluation(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key.startswith("eval/")}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_is_measured_is_the_evaluations_and_training_does_not_notice(
    checkpointing: bool, small: str, train_args: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own: dict[str, Any] = {"model_name_or_path": MODEL, "max_length": 48, "cache_slots": [6], "objective": "cache"}
    own |= {"gradient_checkpointing": checkpointing, "logging_steps": 3}
    train(train_args(**own, output_dir=str(tmp_path / "plain")))
    measured = train_args(**own, output_dir=str(tmp_path / "measured"), eval_steps=2, eval_config=small)
    delta = train(measured)
    assert "measured: measured after step 2 in" in capsys.readouterr().out

    lines = metrics_of(tmp_path / "measured")
    assert [line["train/global_step"] for line in lines] == [0, 1, 2, 3, 4]
    assert [bool(of_evaluation(line)) for line in lines] == [True, False, True, False, True]
    plain = {line["train/global_step"]: line for line in metrics_of(tmp_path / "plain")}
    for line in lines[1:]:
        if line["train/global_step"] in plain:
            rest = {key: value for key, value in line.items() if not key.startswith("eval/")}
            assert rest == plain[line["train/global_step"]]
    for name in (checkpoint.TRAINED, checkpoint.RANDOM):
        one, other = (load_file(tmp_path / run / "checkpoint-4" / name) for run in ("plain", "measured"))
        assert all(torch.equal(one[key], other[key]) for key in one), name

    arms = evaluate(MODEL, [("cache", trained_arm(MODEL, [delta]))], load(EvaluationArguments, small)).arms
    (base,), (tuned,) = arms["base"].runs, arms["cache"].runs
    first, last = of_evaluation(lines[0]), of_evaluation(lines[-1])
    for line, run in ((first, base), (last, tuned)):
        assert line["eval/mean_perplexity"] == pytest.approx(run.quality.mean_perplexity, rel=1e-4)
        assert line["eval/reuse_rate_mean"] == pytest.approx(run.routing.reuse_rate_mean, abs=2e-3)
        assert line["eval/task/headword"] == pytest.approx(run.quality.tasks["headword"].value, abs=1e-6)
        assert line["eval/miss_rate/lru/6_slots"] == pytest.approx(
            run.replay[0].misses / run.replay[0].accesses, abs=2e-3
        )
    change = tuned.difference.perplexity["mean"].relative
    assert abs(change) > 1e-4
    assert last["eval/change/perplexity/mean"] == pytest.approx(change, abs=2e-5)
    assert "eval/change/perplexity/mean" not in first


def test_a_resumed_run_measures_what_one_that_was_never_stopped_does(
    small: str, train_args: Arguments, tmp_path: Path
) -> None:
    own: dict[str, Any] = {"model_name_or_path": MODEL, "max_length": 48, "cache_slots": [6], "eval_steps": 2}
    own |= {"eval_config": small, "resume_from_checkpoint": "auto", "lr_scheduler_type": "constant"}
    train(train_args(**own, output_dir=str(tmp_path / "whole")))
    train(train_args(**own, output_dir=str(tmp_path / "parts"), max_steps=2))
    train(train_args(**own, output_dir=str(tmp_path / "parts")))
    assert metrics_of(tmp_path / "parts") == metrics_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("added", "words"),
    [
        ("memory_budget: 8GiB", "while training the model in memory is measured; leave them out"),
        ("quality: {tasks: [no_such_task]}", "task 'no_such_task' is neither in"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_a_step(
    added: str, words: str, small: str, train_args: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = added.split(":")[0]
    kept = [line for line in SMALL.splitlines() if not line.startswith(key)]
    Path(small).write_text("\n".join([*kept, added]), "utf-8")
    monkeypatch.setattr(loop, "take_step", lambda *_: pytest.fail("a step was taken"))
    with pytest.raises(UserError, match=words):
        train(train_args(eval_steps=2, eval_config=small))


def test_how_often_and_what_go_together(train_args: Arguments) -> None:
    with pytest.raises(ValueError, match="eval_steps and eval_config go together"):
        train_args(eval_steps=2)
    with pytest.raises(ValueError, match="eval_steps=0"):
        train_args(eval_steps=0, eval_config="x.yaml")


def test_inside_nothing_trains_and_afterwards_modes_are_as_they_were() -> None:
    """A layer that checkpoints does without a key-value cache while it trains, which generating needs."""
    model = load_pretrained(MODEL)
    checkpointed = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for module in checkpointed:
        module.training = True
    with _left_as_it_is(model):
        assert not any(module.training for module in model.modules())
        torch.manual_seed(5)
    assert {id(module) for module in model.modules() if module.training} == {id(module) for module in checkpointed}
    assert torch.initial_seed() != 5
