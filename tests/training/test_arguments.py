"""Arguments that make no sense, and models and data that are none, are refused before anything is computed."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.load import UserError
from training.arguments import TrainArguments
from training.run import build

Arguments = Callable[..., TrainArguments]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"report_to": "tensorboard"}, "report_to='tensorboard': write none or wandb"),
        ({"max_steps": 0}, "max_steps=0 must be at least 1"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0 must be at least 1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0 must be at least 1"),
        ({"logging_steps": 0}, "logging_steps=0 must be at least 1"),
        ({"save_steps": 0}, "save_steps=0 must be at least 1"),
        ({"save_total_limit": 0}, "save_total_limit=0 must be at least 1"),
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


def test_a_truncated_shard_is_refused(train_args: Arguments, model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    base = Path(shutil.copytree(model_dir("qwen2_moe"), tmp_path / "base"))
    shard = base / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model .*base cannot be loaded"):
        build(train_args(model_name_or_path=str(base)))


def test_a_model_without_experts_is_refused(train_args: Arguments, model_dir: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match=r"LlamaForCausalLM \(llama\) has no routers"):
        build(train_args(model_name_or_path=str(model_dir("llama"))))
