"""Arguments that make no sense, and models and data that are none, are refused before anything is computed."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.load import UserError
from training.arguments import SCHEDULES, TrainArguments
from training.loop import train_step
from training.model.loading import load_tokenizer
from training.run import build

Arguments = Callable[..., TrainArguments]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"report_to": "tensorboard"}, "report_to='tensorboard': write none or wandb"),
        ({"max_steps": 0}, "max_steps=0: write a number of at least 1"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0: write a number of at least 1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0: write a number of at least 1"),
        ({"logging_steps": 0}, "logging_steps=0: write a number of at least 1"),
        ({"save_steps": 0}, "save_steps=0: write a number of at least 1"),
        ({"save_total_limit": 0}, "save_total_limit=0: write a number of at least 1"),
        ({"max_grad_norm": -1.0}, "max_grad_norm=-1.0: write a number of at least 0"),
        ({"learning_rate": -1e-3}, "learning_rate=-0.001: write a number of at least 0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan: write a number of at least 0"),
        ({"weight_decay": float("inf")}, "weight_decay=inf: write a number of at least 0"),
        ({"adam_beta1": 1.0}, "adam_beta1=1.0: write a number of at least 0 and below 1"),
        ({"warmup_steps": -1}, "warmup_steps=-1: write a number of at least 0"),
        ({"seed": -1}, "seed=-1: write a number of at least 0 and below 4.29497e+09"),
        ({"router_aux_loss_coef": -0.1}, "router_aux_loss_coef=-0.1: write a number of at least 0"),
        ({"miss_temperature": 0.0}, "miss_temperature=0.0: write a number above 0"),
        ({"objective": "cache", "cache_slots": []}, "cache_slots=[]: objective=cache is about caches"),
        (
            {"lr_scheduler_type": "warmup_stable_decay"},
            "lr_scheduler_type='warmup_stable_decay': write one of linear, ",
        ),
        ({"trainable": "experts"}, "trainable='experts': write routers or all"),
        ({"config_name": "x"}, "write exactly one of model_name_or_path"),
        ({"model_name_or_path": None}, "write exactly one of model_name_or_path"),
        ({"model_name_or_path": None, "config_name": "x"}, "has nothing worth freezing; write trainable=all"),
        ({"max_length": 1}, "max_length=1 leaves no pair"),
        ({"objective": "x"}, "objective='x' is not known"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(changed: dict[str, Any], message: str, train_args: Arguments) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        train_args(**changed)


def test_a_run_is_named_after_its_folder_unless_it_has_a_name(train_args: Arguments) -> None:
    assert train_args(output_dir="runs/x").run_name == "x"
    assert train_args(output_dir="runs/x", run_name="mine").run_name == "mine"


@pytest.mark.parametrize("key", ["model_name_or_path", "tokenizer_name"])
def test_a_folder_that_is_not_there_is_refused(key: str, train_args: Arguments) -> None:
    with pytest.raises(
        UserError, match="/nowhere does not exist; give the folder of a saved model or its name on the hub"
    ):
        build(train_args(**{key: "/nowhere"}))


def test_a_folder_without_a_model_or_tokenizer_is_refused(train_args: Arguments, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no config\.json; give the folder of a saved model"):
        build(train_args(model_name_or_path=str(tmp_path)))
    with pytest.raises(UserError, match=r"tokenizer .* cannot be loaded"):
        build(train_args(tokenizer_name=str(tmp_path)))


def test_rows_longer_than_the_model_reaches_are_refused(train_args: Arguments) -> None:
    with pytest.raises(UserError, match="max_length=65 is more than the 64 positions of the model"):
        build(train_args(max_length=65))


def test_a_token_without_embedding_is_named_before_the_model_is_loaded(
    train_args: Arguments, model_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(str(model_dir("qwen2_moe")))
    tokenizer.add_tokens([*(f"<{number}>" for number in range(1000)), "drink"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    monkeypatch.setattr("training.run.loading.build_model", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(UserError, match=r"token \d+ \('drink'\) of the data has no embedding: the model has \d+; give"):
        build(train_args(tokenizer_name=str(tmp_path / "tokenizer")))


def test_a_truncated_shard_is_refused(train_args: Arguments, model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    base = Path(shutil.copytree(model_dir("qwen2_moe"), tmp_path / "base"))
    shard = base / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors is truncated: \d+ bytes"):
        build(train_args(model_name_or_path=str(base)))


def test_a_model_without_experts_is_refused(train_args: Arguments, model_dir: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match=r"LlamaForCausalLM \(llama\) has no routers"):
        build(train_args(model_name_or_path=str(model_dir("llama"))))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_that_is_offered_trains(schedule: str, train_args: Arguments) -> None:
    run = build(train_args(lr_scheduler_type=schedule))
    rates = []
    for _ in range(4):
        train_step(run)
        rates.append(run.scheduler.get_last_lr()[0])
    assert all(0 <= rate <= run.args.learning_rate for rate in rates)


def test_a_norm_of_zero_clips_nothing(train_args: Arguments, tmp_path: Path) -> None:
    moved = {}
    for norm in (0.0, 1e9):
        folder = tmp_path / str(norm)
        run = build(train_args(max_grad_norm=norm, warmup_steps=0, output_dir=str(folder)))
        assert train_step(run)["train/grad_norm"] > 0
        moved[norm] = next(iter(run.trained.values())).detach().clone()
    assert torch.equal(moved[0.0], moved[1e9])
