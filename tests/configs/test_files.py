"""Results are written whole or not at all."""

from pathlib import Path

import pytest

from configs.files import prepare, write_json, writing_aside
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
    with pytest.raises(UserError, match="cannot make the folder for output"):
        prepare(tmp_path / "file" / "r.json")
