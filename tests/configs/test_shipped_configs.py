"""Every YAML that ships is valid, and every key of a run's config is read by somebody."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import yaml

from configs.files import write_yaml
from configs.load import load
from training.arguments import TrainArguments
from training.objective.terms import PRESETS, TERMS

ROOT = Path(__file__).parents[2]
TRAIN = sorted((ROOT / "configs" / "train").rglob("*.yaml"))
ACCELERATE = sorted((ROOT / "configs" / "accelerate").rglob("*.yaml"))


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_there_are_training_configs() -> None:
    assert "configs/train/tiny_pretrain.yaml" in map(named, TRAIN)


@pytest.mark.parametrize("path", TRAIN, ids=named)
def test_a_training_config_loads_and_survives_being_written(path: Path, tmp_path: Path) -> None:
    config = load(TrainArguments, path)
    write_yaml(tmp_path / "again.yaml", config)
    assert load(TrainArguments, tmp_path / "again.yaml") == config


@pytest.mark.parametrize("path", TRAIN, ids=named)
def test_what_a_training_config_names_below_data_is_there(path: Path) -> None:
    config = load(TrainArguments, path)
    for value in (config.config_name, config.tokenizer_name, config.train_file):
        assert value is None or not value.startswith("data/") or (ROOT / value).exists(), value


def test_every_objective_is_an_arm_of_a_shipped_run() -> None:
    runs = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in (ROOT / "configs" / "run").glob("*.yaml")]
    assert {arm["objective"] for run in runs for arm in run["arms"].values()} == set(PRESETS)


@pytest.mark.parametrize("path", ACCELERATE, ids=named)
def test_an_accelerate_config_has_only_keys_that_accelerate_knows(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))  # refuses unknown keys
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert config.num_processes == written["num_processes"]
    assert config.use_cpu == written.get("use_cpu", False)


@pytest.mark.parametrize(("name", "processes"), [("cpu", 1), ("cpu_2_processes", 2)])
def test_the_cpu_configs_use_the_cpu(name: str, processes: int) -> None:
    config = yaml.safe_load((ROOT / "configs" / "accelerate" / f"{name}.yaml").read_text(encoding="utf-8"))
    assert config["use_cpu"] is True
    assert config["num_processes"] == processes


def keys_that_are_read(source: str) -> Iterator[str]:
    """`key` of every `args.key` and `anything.args.key` that is read; a check in __post_init__ (`self.key`) is no use."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value
            name = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ""
            if name == "args":
                yield node.attr


def unread_keys(schema: type, sources: list[str]) -> list[str]:
    read = {key for source in sources for key in keys_that_are_read(source)}
    return [field.name for field in fields(schema) if field.name not in read]


def test_every_key_of_a_training_config_is_read_by_some_code() -> None:
    sources = [
        path.read_text(encoding="utf-8") for folder in ("data", "training") for path in (ROOT / folder).rglob("*.py")
    ]
    read_by_rows = {key for term in TERMS for key in (term.coefficient, term.ramp)}
    assert set(unread_keys(TrainArguments, sources)) <= read_by_rows


def test_a_key_that_nobody_reads_would_be_found() -> None:
    @dataclass
    class Schema:
        used: int = 0
        checked_only: int = 0
        written_only: int = 0

    source = "print(run.args.used)\nself.checked_only\nargs.written_only = 3\n"
    assert unread_keys(Schema, [source]) == ["checked_only", "written_only"]
