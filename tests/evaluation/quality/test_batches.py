"""Answers are kept as they come and belong to exactly one model; what was cut off is computed again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from evaluation.engine.loading import load
from evaluation.engine.options import EngineOptions
from evaluation.quality.batches import Answers, identity_of
from training.model.loading import load_pretrained
from training.model.routers import router_parameters

BATCHES = [["loglikelihood", [1, 2]], ["loglikelihood", [3]], ["generate_until", "x"]]


def answered(folder: Path | None, identity: str = "m", batches: list[Any] = BATCHES) -> tuple[list[Any], list[int]]:
    """All answers, and the places of the batches that had to be computed."""
    computed: list[int] = []

    def compute(place: int) -> Any:
        computed.append(place)
        return [identity, batches[place], 0.1 + place]

    with Answers(folder, identity) as answers:
        return answers.of(batches, compute, engine=None), computed


def test_what_was_answered_is_not_computed_again(tmp_path: Path) -> None:
    first, computed = answered(tmp_path)
    assert computed == [0, 1, 2]
    assert answered(tmp_path) == (first, [])
    more, computed = answered(tmp_path, batches=[["loglikelihood", [4]], *reversed(BATCHES)])
    assert computed == [0]
    assert more[1:] == first[::-1]


def test_answers_of_another_model_are_not_used(tmp_path: Path) -> None:
    answered(tmp_path)
    found, computed = answered(tmp_path, identity="other")
    assert computed == [0, 1, 2]
    assert found[0][0] == "other"


def test_an_answer_that_was_cut_off_is_computed_again(tmp_path: Path) -> None:
    first, _ = answered(tmp_path)
    (path,) = tmp_path.glob("*.jsonl")
    path.write_bytes(path.read_bytes()[:-10])
    again, computed = answered(tmp_path)
    assert (again, computed) == (first, [2])
    assert answered(tmp_path) == (first, [])


def test_answers_of_all_processes_are_known(tmp_path: Path) -> None:
    first, _ = answered(tmp_path)
    (path,) = tmp_path.glob("*.jsonl")
    lines = [line for line in path.read_text("utf-8").splitlines() if line]
    path.write_text(lines[0] + "\n", "utf-8")
    (tmp_path / "1.jsonl").write_text("\n".join(lines[1:]) + "\n", "utf-8")
    assert answered(tmp_path) == (first, [])


def test_without_a_folder_nothing_is_kept() -> None:
    assert answered(None)[1] == answered(None)[1] == [0, 1, 2]


def test_numbers_come_back_bit_for_bit(tmp_path: Path) -> None:
    values = [*torch.rand(50).tolist(), float(torch.tensor(1e-30)), -123.456789]
    with Answers(tmp_path) as answers:
        answers.of([["x"]], lambda _: values, engine=None)
    with Answers(tmp_path) as answers:
        assert answers.of([["x"]], lambda _: pytest.fail("it was kept"), engine=None) == [values]


def test_identity_follows_files_routers_precision_threads_and_levers(
    model_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_dir("qwen2_moe"), folder)
    model = load_pretrained(str(folder))
    found = {identity_of(model, folder, None)}
    assert {identity_of(load_pretrained(str(folder)), folder, None)} == found
    found.add(identity_of(load_pretrained(str(folder), dtype="bfloat16"), folder, None))
    with torch.no_grad():
        next(iter(router_parameters(model).values()))[0, 0] += 1e-3
    found.add(identity_of(model, folder, None))
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    found.add(identity_of(model, folder, None))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    found.add(identity_of(model, folder, None))
    for prior in (0.1, 0.2):
        with load(folder, EngineOptions("50%", lever=f"prior:delta={prior}", warn=False)) as (paged, engine):
            found.add(identity_of(paged, folder, engine))
    assert len(found) == 7
