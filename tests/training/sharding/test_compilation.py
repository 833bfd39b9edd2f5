"""A lock that a killed process left behind holds nobody up; one of a process that compiles is waited for."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from training.sharding import compilation


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(compilation, "POLL_SECONDS", 0.01)
    made = tmp_path / "async_io" / "lock"
    made.parent.mkdir()
    made.touch()
    return made


def age(folder: Path) -> None:
    for path in folder.iterdir():
        os.utime(path, (1, 1))


def test_a_lock_left_behind_is_removed(lock: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (lock.parent / "io.o").touch()
    age(lock.parent)
    compilation.await_other_compilations()
    assert not lock.exists()
    assert "left behind" in capsys.readouterr().out


def test_a_lock_is_waited_for_while_files_beside_it_are_written(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the compiler removes it, here in the third look."""
    looks = []

    def look(_: float) -> None:
        looks.append(lock.exists())
        if len(looks) == 3:
            lock.unlink()

    monkeypatch.setattr(time, "sleep", look)
    compilation.await_other_compilations()
    assert looks == [True, True, True]


def test_a_lock_is_waited_for_while_a_process_works_beside_it(
    lock: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    age(lock.parent)
    with subprocess.Popen([sys.executable, "-c", "input()"], cwd=lock.parent, stdin=subprocess.PIPE) as compiler:

        def look(_: float) -> None:
            assert lock.exists()
            compiler.communicate(b"\n")

        monkeypatch.setattr(time, "sleep", look)
        compilation.await_other_compilations()
    assert "waiting for another process that compiles async_io" in capsys.readouterr().out
    assert not lock.exists(), "once the process is gone"
