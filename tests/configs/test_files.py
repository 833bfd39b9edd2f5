"""Results are written whole or not at all."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from configs.files import folder_aside, prepare, prepare_folder, write_json, write_text, writing_aside
from configs.load import UserError


def write_half(target: Path) -> None:
    with writing_aside(target) as aside:
        aside.write_text("half")
        raise OSError(28, "No space left on device")


def test_a_failure_while_writing_keeps_the_old_file_and_leaves_no_rest(tmp_path: Path) -> None:
    target = tmp_path / "r.json"
    write_json(target, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(target, {"a": float("nan")})
    with pytest.raises(OSError, match="No space") as caught:
        write_half(target)
    assert caught.value.filename == str(target)
    assert target.read_text() == '{\n  "a": 1\n}\n'
    assert list(tmp_path.iterdir()) == [target]


def test_the_folder_is_made_and_impossible_places_are_refused(tmp_path: Path) -> None:
    assert prepare(tmp_path / "a" / "b" / "r.json").parent.is_dir()
    with pytest.raises(UserError, match="is a folder; name a file in it"):
        prepare(tmp_path / "a")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file cannot be made or written into"):
        prepare(tmp_path / "file" / "r.json")


def test_what_is_no_file_is_written_into_and_links_are_followed(tmp_path: Path) -> None:
    pipe, device, target, link = (tmp_path / name for name in ("pipe", "null", "real.txt", "link.txt"))
    os.mkfifo(pipe)
    with ThreadPoolExecutor() as pool:
        read = pool.submit(pipe.read_text)
        write_text(prepare(pipe), "through the pipe")
        assert read.result() == "through the pipe"
    assert pipe.is_fifo()
    device.symlink_to("/dev/null")
    write_text(prepare(device), "nowhere")
    assert device.is_symlink()
    assert device.is_char_device()
    target.write_text("old")
    link.symlink_to(target)
    write_text(prepare(link), "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert {path.name for path in tmp_path.iterdir()} == {"pipe", "null", "real.txt", "link.txt"}


def test_a_folder_that_cannot_be_written_into_is_refused_before_the_work(tmp_path: Path) -> None:
    """/proc takes no files, from nobody."""
    with pytest.raises(UserError, match="/proc cannot be made or written into"):
        prepare("/proc/result.json")
    with pytest.raises(UserError, match="/proc/new cannot be made or written into"):
        prepare_folder("/proc/new")
    assert prepare_folder(tmp_path / "a" / "b").is_dir()
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_whole_file_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text("old, and longer than the new text", encoding="utf-8")
    write_text(path, "new")
    assert path.read_text(encoding="utf-8") == "new"


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new" * 9000 + "\ud800")
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def fill(target: Path, text: str, *, fails: bool = False, replace: bool = False, durable: bool = False) -> None:
    with folder_aside(target, replace=replace, durable=durable) as aside:
        (aside / "inner").mkdir()
        (aside / "inner" / "file").write_text(text)
        if fails:
            raise OSError(28, "No space left on device")


@pytest.mark.parametrize("durable", [False, True])
def test_a_folder_appears_whole_and_is_replaced_only_if_that_is_allowed(durable: bool, tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder"
    fill(target, "old", durable=durable)
    with pytest.raises(OSError, match="not empty"), folder_aside(target, durable=durable) as aside:
        (aside / "file").write_text("new")
    assert (target / "inner" / "file").read_text() == "old"
    fill(target, "new", replace=True, durable=durable)
    assert (target / "inner" / "file").read_text() == "new"
    assert list(target.parent.iterdir()) == [target]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".folder.partial" / "rubbish").mkdir(parents=True)
    fill(tmp_path / "folder", "new")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["inner"]
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]


@pytest.mark.parametrize("replace", [False, True])
def test_a_failure_leaves_the_old_folder_or_none(replace: bool, tmp_path: Path) -> None:
    target = tmp_path / "folder"
    with pytest.raises(OSError, match="No space"):
        fill(target, "half", fails=True, replace=replace)
    assert not list(tmp_path.iterdir())
    fill(target, "old")
    with pytest.raises(OSError, match="No space"):
        fill(target, "half", fails=True, replace=True)
    assert (target / "inner" / "file").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
