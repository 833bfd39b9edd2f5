"""Memory groups: both versions' files are found and written, and a real one counts the page cache and kills."""

import subprocess
import sys
from pathlib import Path

import pytest

from evaluation.benchmark.memory_group import V1, V2, Hierarchy, MemoryGroup, find_hierarchy

PYTHON = [sys.executable, "-S", "-c"]


def made_up(tmp_path: Path, mounts: str, own: str) -> Path:
    """What /proc/self would say."""
    (tmp_path / "mounts").write_text(mounts)
    (tmp_path / "cgroup").write_text(own)
    return tmp_path


class Kernel:
    """Makes the files of a new group, as the kernel does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, files: dict[str, str]) -> None:
        plain_mkdir, plain_rmdir = Path.mkdir, Path.rmdir

        def mkdir(path: Path, *args: object, **kwargs: object) -> None:
            plain_mkdir(path)
            for name, content in files.items():
                (path / name).write_text(content)

        def rmdir(path: Path) -> None:
            for file in path.iterdir():
                file.unlink()
            plain_rmdir(path)

        monkeypatch.setattr(Path, "mkdir", mkdir)
        monkeypatch.setattr(Path, "rmdir", rmdir)


def test_version_1_is_found_in_the_own_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory" / "job").mkdir(parents=True)
    Kernel(monkeypatch, {V1.limit: "9"})
    proc = made_up(tmp_path, f"cgroup {tmp_path}/memory cgroup rw,memory 0 0\n", "4:memory:/job\n0::/\n")
    assert find_hierarchy(proc) == Hierarchy(V1, tmp_path / "memory" / "job")


def test_version_2_falls_back_to_a_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "v2").mkdir()
    (tmp_path / "v2" / "cgroup.controllers").write_text("cpu memory io\n")
    Kernel(monkeypatch, {V2.limit: "max"})
    proc = made_up(tmp_path, f"cgroup2 {tmp_path}/v2 cgroup2 rw 0 0\n", "0::/not/there\n")
    assert find_hierarchy(proc) == Hierarchy(V2, tmp_path / "v2")


@pytest.mark.parametrize("controllers", ["cpu io\n", None])
def test_no_controller_is_none(tmp_path: Path, controllers: str | None) -> None:
    (tmp_path / "v2").mkdir()
    if controllers:
        (tmp_path / "v2" / "cgroup.controllers").write_text(controllers)
    assert find_hierarchy(made_up(tmp_path, f"cgroup2 {tmp_path}/v2 cgroup2 rw 0 0\n", "0::/\n")) is None


def test_a_group_without_a_limit_file_is_no_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory").mkdir()
    Kernel(monkeypatch, {})
    proc = made_up(tmp_path, f"cgroup {tmp_path}/memory cgroup rw,memory 0 0\n", "4:memory:/\n")
    assert find_hierarchy(proc) is None


def test_version_2_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel_files = {V2.limit: "max", "memory.swap.max": "max", V2.peak: "4096\n", V2.events: "low 0\noom_kill 1\n"}
    Kernel(monkeypatch, kernel_files)
    with MemoryGroup(Hierarchy(V2, tmp_path), 1 << 20) as group:
        assert (group.path / "memory.max").read_text() == str(1 << 20)
        assert (group.path / "memory.swap.max").read_text() == "0"
        assert group.peak_bytes == 4096
        assert group.was_killed
        (group.path / V2.events).write_text("low 0\noom_kill 0\n")
        assert not group.was_killed
    assert not group.path.exists()


@pytest.fixture
def hierarchy() -> Hierarchy:
    found = find_hierarchy()
    if found is None:
        pytest.skip("no memory controller in which this user may make groups")
    return found


def run_in(group: MemoryGroup, code: str) -> int:
    return subprocess.run(group.command([*PYTHON, code]), check=False).returncode


def test_a_process_beyond_its_limit_is_killed_and_known(hierarchy: Hierarchy) -> None:
    with MemoryGroup(hierarchy, 64 << 20) as group:
        assert run_in(group, "bytearray(8 << 20)") == 0
        assert not group.was_killed
        assert run_in(group, "x = b'1' * (128 << 20)") != 0
        assert group.was_killed
    assert not group.path.exists()


def test_the_peak_counts_the_page_cache(hierarchy: Hierarchy, tmp_path: Path) -> None:
    write = f"f = open({str(tmp_path / 'file')!r}, 'wb'); [f.write(bytes(1 << 20)) for _ in range(48)]"
    with MemoryGroup(hierarchy, None) as group:
        assert run_in(group, write) == 0
        assert group.peak_bytes is not None
        assert group.peak_bytes > 48 << 20
