"""The shipped tasks are what the script makes of the test split, and another split's have the same form."""

import json
from pathlib import Path

import pytest
import yaml

from data.build_tasks import TASKS, BuildTasks, build
from data.corpus import read_corpus

NAMES = sorted(path.stem for path in TASKS.glob("*.yaml"))


def items(folder: Path, name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_shipped_items_are_those_of_the_test_split(tmp_path: Path) -> None:
    build(BuildTasks(output=tmp_path))
    for name in NAMES:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (TASKS / f"{name}.jsonl").read_bytes(), name


def test_the_validation_tasks_are_of_validation_documents_and_read_their_own_items(tmp_path: Path) -> None:
    build(BuildTasks(split="validation", output=tmp_path))
    known = {document.id for document in read_corpus("validation")}
    for name in NAMES:
        found = items(tmp_path, name)
        assert len(found) >= 300
        assert {item["document"] for item in found} <= known
        description = yaml.safe_load((tmp_path / f"{name}.yaml").read_text(encoding="utf-8"))
        assert description["dataset_kwargs"]["data_files"]["test"] == f"{tmp_path}/{name}.jsonl"


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("perplexity")])
def test_a_choice_has_its_answer_once_and_an_answer_is_bare(name: str) -> None:
    for item in items(TASKS, name):
        choices = item.get("choices")
        if choices is None:
            assert item["answer"] == str(item["answer"]).strip()
        else:
            assert len(choices) == len(set(choices)) == 4, item
