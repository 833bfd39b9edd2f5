"""Checkpoints are whole or not there, and bring everything back."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from configs.load import UserError
from training.run_folder import checkpoint


class Small:
    """Two tensors with an optimizer that has taken a step."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.trained = {"b.weight": nn.Parameter(torch.randn(3, 2)), "a.weight": nn.Parameter(torch.randn(4))}
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=0.1)
        self.step()

    def step(self) -> None:
        for parameter in self.trained.values():
            parameter.grad = torch.randn_like(parameter)
        self.optimizer.step()

    def save(self, folder: Path, step: int, *, keep: int = 2) -> Path:
        state = {"num_tokens": 10 * step}
        return checkpoint.save(folder, step, trained=self.trained, optimizer=self.optimizer, state=state, keep=keep)

    def load(self, path: Path) -> None:
        checkpoint.load(path, trained=self.trained, optimizer=self.optimizer)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_tensors_optimizer_and_random_state_come_back_bit_for_bit(tmp_path: Path) -> None:
    one, other = Small(), Small(seed=5)
    path = one.save(tmp_path, 3)
    one.step()
    expected = torch.randn(3)
    other.load(path)
    other.step()
    assert torch.equal(torch.randn(3), expected)
    for name in one.trained:
        assert torch.equal(one.trained[name], other.trained[name])
        moments, found = (small.optimizer.state[small.trained[name]] for small in (one, other))
        assert moments.keys() == found.keys()
        assert all(torch.equal(moments[key], found[key]) for key in moments)


def test_the_state_holds_the_step_and_what_the_caller_gave(tmp_path: Path) -> None:
    assert checkpoint.load_state(Small().save(tmp_path, 3)) == {"global_step": 3, "num_tokens": 30}


def test_there_are_only_safetensors_and_json(tmp_path: Path) -> None:
    path = Small().save(tmp_path, 3)
    expected = ["optimizer.safetensors", "random.safetensors", "trained.safetensors", "trainer_state.json"]
    assert names(path) == expected


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_only_the_newest_are_kept(keep: int, tmp_path: Path) -> None:
    small = Small()
    for step in (2, 8, 9, 10, 100):
        small.save(tmp_path, step, keep=keep)
    assert names(tmp_path) == sorted(f"checkpoint-{step}" for step in (2, 8, 9, 10, 100)[-keep:])


def test_a_checkpoint_is_never_deleted_by_its_own_save(tmp_path: Path) -> None:
    small = Small()
    small.save(tmp_path, 8, keep=1)
    assert small.save(tmp_path, 4, keep=1).is_dir()


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    one, other = Small(), Small(seed=5)
    one.save(tmp_path, 3)
    path = other.save(tmp_path, 3)
    one.load(path)
    assert all(torch.equal(one.trained[name], other.trained[name]) for name in one.trained)
    assert names(tmp_path) == ["checkpoint-3"]


def test_without_a_wish_nothing_is_resumed(tmp_path: Path) -> None:
    Small().save(tmp_path, 3)
    assert checkpoint.find(tmp_path, None) is None


def test_auto_takes_the_newest_by_number(tmp_path: Path) -> None:
    small = Small()
    for step in (9, 10):
        small.save(tmp_path, step)
    assert checkpoint.find(tmp_path, "auto") == tmp_path / "checkpoint-10"


def test_folders_of_other_names_are_left_alone(tmp_path: Path) -> None:
    newest = Small().save(tmp_path, 10)
    for name in ("checkpoint-4-backup", "checkpoint-best", "checkpoint-"):
        shutil.copytree(newest, tmp_path / name)
    assert checkpoint.find(tmp_path, "auto") == newest
    last = Small().save(tmp_path, 11)
    assert checkpoint.find(tmp_path, "auto") == last
    assert (tmp_path / "checkpoint-best").is_dir()


def test_auto_starts_afresh_where_there_is_nothing(tmp_path: Path) -> None:
    assert checkpoint.find(tmp_path, "auto") is None
    assert checkpoint.find(tmp_path / "nowhere", "auto") is None


def test_auto_never_takes_a_half_written_checkpoint(tmp_path: Path) -> None:
    small = Small()
    small.save(tmp_path, 3)
    small.save(tmp_path, 4).rename(tmp_path / ".checkpoint-5.partial")
    (small.save(tmp_path, 6) / checkpoint.STATE).unlink()
    assert checkpoint.find(tmp_path, "auto") == tmp_path / "checkpoint-3"
    assert ".checkpoint-5.partial" not in names(tmp_path)


def test_what_a_killed_save_left_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint-3.partial").mkdir()
    (tmp_path / ".checkpoint-3.partial" / "rubbish").write_text("x", encoding="utf-8")
    path = Small().save(tmp_path, 3)
    assert "rubbish" not in names(path)
    assert names(tmp_path) == ["checkpoint-3"]


def test_a_named_checkpoint_is_taken_or_refused(tmp_path: Path) -> None:
    small = Small()
    old = small.save(tmp_path, 3)
    small.save(tmp_path, 4)
    assert checkpoint.find(tmp_path, str(old)) == old
    with pytest.raises(UserError, match=r"nowhere is not a checkpoint folder \(no trainer_state\.json\); write auto"):
        checkpoint.find(tmp_path, str(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", [checkpoint.TRAINED, checkpoint.OPTIMIZER, checkpoint.RANDOM])
@pytest.mark.parametrize("missing", [True, False])
def test_a_damaged_checkpoint_is_refused(name: str, missing: bool, tmp_path: Path) -> None:
    small = Small()
    path = small.save(tmp_path, 3)
    if missing:
        (path / name).unlink()
    else:
        (path / name).write_bytes((path / name).read_bytes()[:-4])
    with pytest.raises(UserError, match=r"checkpoint-3 is damaged .*delete it to resume from the one before"):
        small.load(path)


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    path = Small().save(tmp_path, 3)
    (path / checkpoint.STATE).write_text('{"global_st', encoding="utf-8")
    with pytest.raises(UserError, match=r"checkpoint-3 is damaged .*delete it to resume from the one before"):
        checkpoint.load_state(path)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    small, other = Small(), Small()
    path = small.save(tmp_path, 3)
    other.trained["b.weight"] = nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(
        UserError, match="holds other tensors than this run trains; it belongs to another model or config"
    ):
        other.load(path)


def test_whoever_may_read_one_file_may_read_all(tmp_path: Path) -> None:
    modes = {path.stat().st_mode for path in Small().save(tmp_path, 3).iterdir()}
    assert len(modes) == 1


def failing_at(nth: int, write: Callable[..., int]) -> Callable[..., int]:
    """`write`, but the nth call leaves half a file and finds the disk full."""
    calls = []

    def attempt(path: Path, content: bytes) -> int:
        calls.append(path)
        if len(calls) == nth:
            write(path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, content)

    return attempt


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_full_disk_is_one_clear_error_and_keeps_the_earlier_checkpoint(
    nth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = Small()
    small.save(tmp_path, 3, keep=1)
    saved = small.trained["a.weight"].detach().clone()
    small.step()
    monkeypatch.setattr(Path, "write_bytes", failing_at(nth, Path.write_bytes))
    with pytest.raises(
        UserError, match=r"checkpoint-4 cannot be written .*disk is full or not writable. Earlier .*auto"
    ):
        small.save(tmp_path, 4, keep=1)
    assert names(tmp_path) == ["checkpoint-3"]
    small.load(tmp_path / "checkpoint-3")
    assert torch.equal(small.trained["a.weight"], saved)


def test_a_state_that_cannot_be_written_as_json_leaves_no_checkpoint_behind(tmp_path: Path) -> None:
    small = Small()
    with pytest.raises(TypeError):
        checkpoint.save(tmp_path, 3, trained=small.trained, optimizer=small.optimizer, state={"x": object()}, keep=1)
    assert checkpoint.find(tmp_path, "auto") is None
    assert json.dumps(names(tmp_path)) == "[]"
